"""The parts of :mod:`lightning_grad.functional.gradients.per_sample_gradients`: norms from one backward pass.

``tracer.py`` intercepts every use of a parameter in a forward pass. ``rules.py`` maps operations to rules; rules of
layers are in ``layers.py`` and ``convolutions.py``. ``contributions.py`` has the contributions of a use to each
sample's gradient, and ``sums.py`` their sum and its norm. ``layouts.py`` describes which rows belong to which sample.
``graph.py`` finds the layouts, and measures parameters without a rule one sample at a time. ``outline.py`` notices
that a network has changed.
``docs/data_pruning/per_sample_gradients.md`` explains how the parts work together.
"""
