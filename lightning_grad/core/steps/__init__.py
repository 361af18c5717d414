"""Optimizer steps: evaluated a second time, with other learning rates, or with moments that hold still.

- ``step_window.py``: the batches of one step, run again at other weights;
- ``held_rates.py``: learning rates multiplied for the length of a step;
- ``chosen_rates.py``: learning rates scaled for the rest of the run, with their schedulers;
- ``frozen_moments.py``: moments of an Adam-like optimizer that stay as they are.
"""
