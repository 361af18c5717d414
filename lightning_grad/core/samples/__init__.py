"""The samples of a fit: the training loader, its batches, and the changing length of epochs and schedules.

- ``training_set.py``: the samples of each batch and of each epoch;
- ``training_loaders.py``: the loaders of a fit, their batch samplers, and the Trainer's number of
  batches per epoch;
- ``schedule_warp.py``: learning-rate schedules that still reach their end if epochs get shorter or
  longer;
- ``loader_batch_size.py``: the number of samples in a full batch.
"""
