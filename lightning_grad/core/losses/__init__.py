"""Losses of samples: captured in a module's own step, reweighted in it, checked, and measured over a training set.

- ``sample_losses.py``: the loss that a step returns, and the loss of each sample in it;
- ``given_functions.py``: a technique's requirements on the losses of a step, and the user functions
  ``loss_fn=`` and ``outputs_fn=`` that replace the step;
- ``batch_sizes.py``: the number of samples in a batch;
- ``look.py``: measures one batch in a quiet module;
- ``scoring.py``: measures every sample of a training set;
- ``loss_tap.py``, ``weighted_steps.py``: reading losses in training, weighting them, adding to them;
- ``rehearsal.py``, ``row_order.py``: check on one batch that rows of a loss follow their samples;
- ``one_sample.py``: measures the cost of running a step on one sample at a time.
"""
