"""How :mod:`lightning_grad.functional.gradients.per_sample_gradients` gets per-sample norms out of one backward pass.

``tracer.py`` sees every use of a parameter in a forward pass. ``rules.py`` knows the operations that have a rule, and
``layers.py``, ``convolutions.py``, ``elementwise.py`` and ``tables.py`` hold those rules by kind, in the terms of
``binding.py``. What a use contributes to the gradient of each sample is in ``contributions.py``, their sum and its norm in
``sums.py``. ``layouts.py`` and ``probing.py`` find out which rows belong to which sample. ``graph.py`` finds the parameters
that no rule covers, and measures them one sample at a time. ``docs/data_pruning/per_sample_gradients.md`` shows how all this
hangs together.
"""
