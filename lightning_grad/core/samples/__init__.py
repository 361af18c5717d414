"""The samples of a fit: the training loader and its batches, and epochs and schedules that change their length.

- ``training_set.py``: which samples each batch holds, and which an epoch trains on;
- ``training_loaders.py``: which loaders there are, where one keeps its batches of indices, and a Trainer that is told of
  shorter and longer epochs;
- ``schedule_warp.py``: learning-rate schedules that end where they should all the same.
"""
