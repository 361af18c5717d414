"""How :mod:`lightning_grad.functional.gradients.per_sample_gradients` gets per-sample norms out of one backward pass.

``tracer.py`` sees every use of a parameter in a forward pass. ``rules.py`` knows the operations that have a rule;
``layers.py`` and ``convolutions.py`` hold those of layers. What a use contributes to the gradient of each sample is in
``contributions.py``, their sum and its norm in ``sums.py``. ``layouts.py`` describes which rows belong to which sample.
``graph.py`` finds out, and measures the parameters that no rule covers one sample at a time.
``docs/data_pruning/per_sample_gradients.md`` shows how all this hangs together.
"""
