"""Losses and gradients of single samples, from training steps that return one number for a batch.

The data flow, from a step to shares of the samples, and from weights back to gradients::

    step --trace--> record --walk--> cuts --values--> shares of the samples --> scores
                                      |                       |
                                      +------- hooks <----- weights --> gradient of the weighted loss

1. **Watch.** :class:`LossTrace` (``trace.py``) is a context around the step. It changes nothing, and records
   (``record.py``) what the graph does not contain: which row of a tensor belongs to which sample, and the calls of
   losses of ``torch.nn.functional``. ``rows.py`` computes what a function does to rows, ``follow.py`` stores the rows
   of each tensor, ``calls.py`` reads a :class:`LossCall` from each call, and ``loss_functions.py`` describes their
   arguments and denominators.
2. **Walk.** ``walk.py`` follows the autograd graph from the returned loss to the *cuts*, the edges at which rows begin.
   It proves that each node is linear in everything that depends on samples, and otherwise rejects the loss
   (``errors.py``).
3. **Add up.** ``values.py`` multiplies the rows at each cut by their coefficients. ``terms.py`` turns them into
   :class:`Terms`: the share of each sample, its own mean, and the constant that belongs to no sample.
4. **Weight.** :meth:`Terms.weight_` registers hooks that weight each sample at the cuts. The backward pass then
   computes the gradient of the weighted loss, without computing anything twice.

The graph cannot show whether the shares follow the samples. ``core/losses/rehearsal.py`` tests this by running a step
on the same samples in other orders.

Most steps return one call of a loss. :class:`LossCapture` (``loss_capture.py``) suffices for them and watches nothing
else; :class:`WholeLossCapture` (``whole_loss.py``) checks once whether that call is the whole loss. Undocumented parts
of autograd are used in ``autograd.py`` only.
"""
