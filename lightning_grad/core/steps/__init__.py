"""Tools for optimizer steps: repeated steps, temporary learning rates and frozen moments.

- ``step_window.py``: the batches of one step, run again at other weights;
- ``averaged_weights.py``: weights for inference that are averages;
- ``gradient_graphs.py``: backward passes that keep the graph of the gradients;
- ``held_rates.py``: learning rates multiplied during one step;
- ``chosen_rates.py``: learning rates scaled for the rest of the run, and their
  schedulers;
- ``noise_scale.py``: the noise of the gradient, from its micro-batches and ranks;
- ``replacement.py``: another optimizer, for everything that holds the module's;
- ``frozen_moments.py``: frozen moments of an Adam-like optimizer.
"""
