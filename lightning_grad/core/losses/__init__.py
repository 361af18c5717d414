"""The losses of samples: read from a module's own step, weighted in it, checked, and measured over a training set.

- ``sample_losses.py``: what a step returns as its loss, and the loss of each sample in it;
- ``given_functions.py``: what a technique asks of the losses of a step, and functions of users in the step's place,
  ``loss_fn=`` and ``outputs_fn=``;
- ``batch_sizes.py``: the number of samples of a batch;
- ``look.py``: one batch in a quiet module, and all that can be measured of it;
- ``scoring.py``: such a look at every sample of a training set;
- ``loss_tap.py``, ``weighted_steps.py``: reading and weighting losses in training;
- ``rehearsal.py``, ``row_order.py``: whether rows of a loss follow their samples, shown on one batch;
- ``one_sample.py``: what it costs to run a step on one sample at a time.
"""
