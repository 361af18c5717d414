"""The loss and the gradient of single samples, from training steps that return one number for a batch.

From a step to shares, and from shares to weights::

    step --trace--> record --walk--> cuts --values--> shares of the samples --> scores
                                      |                       |
                                      +------- hooks <----- weights --> gradient of the weighted loss

1. **Watch.** :class:`LossTrace` (``trace.py``) is a context around the step. It changes nothing, and notes in a
   ``record.py`` what the graph will not tell: which row of a tensor belongs to which sample (``rows.py`` knows what functions
   do to rows, ``follow.py`` which tensors that has happened to), and the calls of losses of ``torch.nn.functional``
   (``calls.py`` reads a :class:`LossCall` of each; ``loss_functions.py`` has their arguments and denominators).
2. **Walk.** ``walk.py`` goes from the returned loss through the autograd graph to the *cuts*, the edges at which rows begin.
   It proves on the way that each node is linear in what depends on samples, and refuses the loss otherwise
   (``errors.py``).
3. **Add up.** ``values.py`` multiplies the rows at each cut by their coefficients; ``terms.py`` makes :class:`Terms` of that:
   the share of each sample, its own mean, and the constant that belongs to no sample.
4. **Weight.** :meth:`Terms.weight_` hooks a weight for each sample onto the cuts. Backward then gives the
   gradient of the weighted loss, and nothing is computed twice.

What no graph can show is whether the shares follow the samples. ``core/losses/rehearsal.py`` finds out by running a
step on the same samples in other orders.

Most steps return one call of a loss. For these :class:`LossCapture` (``loss_capture.py``) is enough, which watches nothing
else; :class:`WholeLossCapture` (``whole_loss.py``) finds out once whether that call is the whole loss. The undocumented
parts of autograd are in ``autograd.py``, and nowhere else.
"""
