"""Weights that a module is shown in place of those that train, and what a checkpoint holds of them.

- ``weight_choice.py``, ``network_ends.py``: which weights a technique takes, by default all but the first
  and the last layer;
- ``weight_chain.py``: one weight, what one technique after the other makes of it, and for all weights of one module what
  happens once for all techniques;
- ``weight_view.py``: how a module sees another weight than its own;
- ``portable.py``: checkpoints that load anywhere, and resume exactly.
"""
