"""Views: weights with which a module computes in place of those that train, and their checkpoints.

- ``weight_choice.py``, ``network_ends.py``: the weights that a technique chooses, by default those
  of all layers except the first and the last;
- ``weight_chain.py``: the stages of one weight, and what happens once per module for all
  techniques;
- ``weight_view.py``: the two ways to make a module compute with a view;
- ``adapted_layer.py``: parameters of a technique next to a frozen weight;
- ``portable.py``: checkpoints that load without lightning-grad and resume exactly.
"""
