r"""Compute the norm of each sample's gradient over all parameters, at about the cost of one forward and backward pass.

The gradient of a sample's own loss shows how much the sample would change the network (GraNd). Storing one gradient per
sample takes B times the memory of the parameters, but its norm does not need that. At a linear layer, for example, the
gradient of sample b is the product :math:`g_b a_b^T` of the output's gradient and the input. Its norm is
:math:`\lVert g_b \rVert \lVert a_b \rVert`, and both factors are available during one ordinary backward pass.

Parameters are followed through all operations that use them, not through module classes, so custom modules, tied
weights and modules that are called twice need no special treatment. Parameters without a rule are measured by one
backward pass per sample, through only the part of the network that they need; :attr:`PerSampleGradientNorms.coverage`
lists them. ``docs/data_pruning/per_sample_gradients.md`` explains how it works, with a drawing.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from lightning_grad.functional.choices import check_choice
from lightning_grad.functional.gradients._ghost import graph
from lightning_grad.functional.gradients._ghost.contributions import Contribution
from lightning_grad.functional.gradients._ghost.layouts import Layout, candidates
from lightning_grad.functional.gradients._ghost.outline import Outline, outline_of
from lightning_grad.functional.gradients._ghost.sums import SquaredNorms
from lightning_grad.functional.gradients._ghost.tracer import Key, Leaf, Source, Tracer, Use

_PROBES = 8  # samples to probe before an undecided layout is accepted
_RUNS = 12  # largest number of forward passes for the first batch; each but the last learns something


class PerSampleGradientNorms:
    r"""Compute the norm of the gradient of each sample's own loss over all trainable parameters.

    .. math::
        n_b = \lVert \nabla_\theta \ell_b(\theta) \rVert_2 = \Bigl(\sum_{p \in \theta}
        \lVert \partial \ell_b / \partial p \rVert_F^2\Bigr)^{1/2}

    where :math:`\ell_b` is the loss of sample b, and :math:`\theta` are all parameters of the module that require grad,
    including normalization layers. The result equals one backward pass per sample, up to rounding.

    From the first batch, the object learns the dimension of the samples in each tensor, by backward passes of single
    losses, and which parameters no rule covers. Gradients, hooks and flags are restored after each call, even after an
    exception.

    **Cost.** One forward and one backward pass, with about the memory of a plain pass: see docs/benchmarks.md, also for
    ``vmap(grad(...))``. The first batch takes a few more passes. Parameters without a rule (recurrent layers, ``bmm``,
    ``einsum``, custom autograd functions) cost one backward pass per sample.

    Args:
        module: The module whose trainable parameters are measured; in eval mode if it has BatchNorm.
        fallback: "auto" measures parameters without a rule by one backward pass per sample, "raise" raises.

    Raises:
        ValueError: If ``fallback`` is unknown, or no parameter of the module requires grad. From a call, if the losses
            are not a tensor (B,) or have no graph.
        RuntimeError: From a call, if the loss of a sample depends on other samples (BatchNorm in training mode,
            contrastive losses), or if a parameter has no rule with ``fallback="raise"``.

    Example:
        >>> module = nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        >>> norms = PerSampleGradientNorms(module)
        >>> norms(lambda: module(inputs).squeeze(1))
        tensor([ 5., 10.])
        >>> dict(norms.coverage)
        {'weight': 'ghost: linear'}

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, definition 2.1 (GraNd).
        Goodfellow, "Efficient per-example gradient computations", 2015, arXiv 1510.01799 (linear layers).
        Li et al., "Large language models can be strong differentially private learners", 2021, arXiv 2110.05679,
        section 4 (ghost norms: sequences by Gram matrices).
        Bu et al., "Scalable and efficient training of large convolutional neural networks with differential privacy",
        2022, arXiv 2205.10683, section 4 (choice between Gram matrices and products).
    """

    def __init__(self, module: nn.Module, fallback: Literal["auto", "raise"] = "auto") -> None:
        check_choice(fallback, ("auto", "raise"), "fallback")
        _trainable(module)
        self._module = module
        self._fallback = fallback
        self._coverage: dict[str, str] = {}
        self._outline: Outline | None = None
        self._is_new_pass = True
        self._forget()

    def _forget(self) -> None:
        self._excluded: set[str] = set()
        self._batchless: set[Key] = set()
        self._mixing: dict[str, str] = {}
        self._silent: set[Key] = set()
        self._folded: set[Key] = set()
        self._layouts: dict[tuple[Key, int], Layout] = {}

    @property
    def coverage(self) -> Mapping[str, str]:
        """How each trainable parameter was measured in the last call, by name.

        The value is "ghost: " with the operations, "per-sample backward: " with the operations without a rule, or
        "unused".
        """
        return self._coverage

    def begin_pass(self) -> None:
        """Compare the network with what was learned from it in the next call, and learn it again if it has changed.

        Call it if the module may have changed since the last call: parameters were unfrozen, or it now runs other
        operations. The comparison reads the autograd graph of one batch and takes no backward pass.
        """
        self._is_new_pass = True

    def __call__(self, compute_losses: Callable[[], Tensor]) -> Tensor:
        """Return the norms, (B,).

        Args:
            compute_losses: Function that runs the module and returns the losses, (B,), with their graph.
                It is called several times for the first batch, with the same random numbers.
        """
        parameters = _trainable(self._module)
        _refuse_training_batch_norm(self._module)
        with _plain_forward():
            try:
                return self._run(compute_losses, parameters)
            except CheckpointError as error:
                raise RuntimeError(
                    "Per-sample gradient norms do not work with torch.utils.checkpoint.checkpoint, because it runs a "
                    "part of the module again during the backward pass. Turn activation checkpointing off while "
                    "measuring."
                ) from error

    def _run(self, compute_losses: Callable[[], Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
        """Run the forward pass until all layouts and all parameters without a rule are known, then measure."""
        rewind = _rewinding(parameters.values())
        for _ in range(_RUNS):
            with closing(Tracer(parameters, self._excluded, self._batchless)) as tracer:
                with tracer:
                    losses = _checked(compute_losses())
                tracer.finish(losses)
                if not self._is_stale(tracer) and not self._learn(tracer):
                    self._remember(tracer)
                    return self._measure(tracer)
            rewind()
        raise RuntimeError(
            "compute_losses must do the same in each call, but its operations differ between calls. Draw random "
            "numbers only from torch's global generators, and keep no state between calls."
        )

    def _is_stale(self, tracer: Tracer) -> bool:
        """Forget what an earlier pass learned if the network has changed; return True if it must then run again."""
        if not self._is_new_pass or self._outline is None:
            return False
        was_traced_otherwise = bool(self._excluded or self._batchless)
        if outline_of(tracer) == self._outline:
            # The outline shows these uses only; those of batches with other shapes are learned again.
            seen = {(use.key, len(use.shape)) for use in tracer.uses}
            self._layouts = {place: layout for place, layout in self._layouts.items() if place in seen}
            self._is_new_pass = False
            return False
        self._forget()
        self._outline = None
        return was_traced_otherwise

    def _remember(self, tracer: Tracer) -> None:
        """Keep the outline of the first batch of a pass."""
        if self._is_new_pass:
            self._outline, self._is_new_pass = outline_of(tracer), False

    def _learn(self, tracer: Tracer) -> bool:
        """Learn from a forward pass; return True if it must run again with the new knowledge."""
        if self._exclude(tracer, {name for name, p in tracer.parameters.items() if id(p) in tracer.ends}):
            return True
        unknown = [use for use in tracer.uses if not self._recall(use, len(tracer.losses))]
        if not unknown:
            return False
        failed = self._probe(tracer, unknown)
        if failed:
            self._settle(failed, tracer)
        return bool(failed)

    def _settle(self, failed: Sequence[Use], tracer: Tracer) -> None:
        """Decide on uses without a matching layout.

        If the samples are separate but in no known order, autograd measures the parameters. If one tensor is used for
        all samples, the use is batchless. Otherwise the samples are mixed, which is an error.
        """
        meeting = graph.where_samples_meet(failed, tracer)
        apart = [use for use in failed if id(use) not in meeting]
        alike = [use for use in failed if id(use) in meeting and use.is_batchless]
        if not apart and not alike:
            raise _mixed(failed[0].key[0], failed[0].roots)
        for use in apart:
            self._excluded |= use.roots
        for use in alike:
            self._batchless.add(use.key)
            if candidates(use.shape, use.dims, len(tracer.losses)):  # may also be a batch whose samples are mixed later
                self._mixing |= dict.fromkeys(use.roots, use.key[0])

    def _exclude(self, tracer: Tracer, reached: set[str]) -> bool:
        """Leave parameters that the graph still reaches to autograd; return True if one of them was covered so far."""
        mixing = reached & set(self._mixing)
        if mixing:
            raise _mixed(self._mixing[min(mixing)], mixing)
        covered = [source.roots for use in tracer.uses for source, _ in use.terms]
        if not any(roots & reached for roots in covered):
            return False
        while any(roots & reached and not roots <= reached for roots in covered):
            reached = reached.union(*(roots for roots in covered if roots & reached))
        self._excluded |= reached
        return True

    def _recall(self, use: Use, samples: int) -> bool:
        """Set the layout learned from earlier batches; return True if it is known."""
        known = Layout(None) if samples == 1 else self._layouts.get((use.key, len(use.shape)))
        if known is not None and known.is_ambiguous(use.shape, samples) and use.key not in self._folded:
            return False  # learned with one entry per sample, which does not show the order of several
        if known is not None and known.fits(use.shape, samples):
            use.layout = known
        return use.layout is not None

    def _probe(self, tracer: Tracer, unknown: Sequence[Use]) -> list[Use]:
        """Find the layouts by backward passes of single losses; return the uses without a matching layout."""
        silent = {use.key for use in unknown} <= self._silent  # gradients were zero before: probe one sample only
        answers = graph.probe_layouts(unknown, tracer, most=1 if silent else _PROBES)
        for use, (layout, is_certain) in zip(unknown, answers, strict=True):
            use.layout = layout
            if layout is not None and is_certain:
                self._layouts[use.key, len(use.shape)] = layout
                if layout.is_ambiguous(use.shape, len(tracer.losses)):
                    self._folded.add(use.key)
            elif layout is not None:
                self._silent.add(use.key)
        return [use for use in unknown if use.layout is None]

    def _measure(self, tracer: Tracer) -> Tensor:
        """Return the norms: by rules, and by one backward pass per sample for parameters without a rule."""
        rest, entries = self._without_rule(tracer)
        sums = SquaredNorms(tracer.uses, tracer.parameters, self._like(tracer))
        if rest:
            sums.total += graph.squared_norms_by_backward(tracer.losses, list(rest.values()), entries)
        self._add_up(tracer, sums.add)
        return sums.finish().clamp(min=0).sqrt()

    def _without_rule(self, tracer: Tracer) -> tuple[Mapping[str, Tensor], int]:
        """Return the parameters without a rule, and the entries of memory that a backward pass to them needs."""
        ends = tracer.ends
        rest = {name: p for name, p in tracer.parameters.items() if id(p) in ends}
        self._report(tracer, {name: ends[id(p)] for name, p in rest.items()})
        if rest and self._fallback == "raise":
            raise RuntimeError(_uncovered_message({name: self._coverage[name] for name in rest}))
        sizes = [*(p.numel() for p in rest.values()), *(math.prod(use.shape) for use in tracer.uses)]
        return rest, 4 * max(sizes, default=1)

    def _like(self, tracer: Tracer) -> Tensor:
        """Return a tensor (B,) with the dtype and device of the results."""
        is_double = any(tensor.dtype == torch.float64 for tensor in (tracer.losses, *tracer.parameters.values()))
        return tracer.losses.detach().to(torch.float64 if is_double else torch.float32)

    def _add_up(self, tracer: Tracer, add: Callable[[Source, Contribution], None]) -> None:
        """Run the backward pass, and hand on the contribution of each use of a parameter."""
        losses, dtype = tracer.losses, self._like(tracer).dtype

        def receive(use: Use, gradient: Tensor) -> None:
            layout = use.layout
            assert layout is not None
            use.check_unchanged()

            def rows(tensor: Tensor) -> Tensor:
                split = layout.split(tensor, len(losses))
                return split.to(dtype) if split.is_floating_point() else split

            for source, term in use.terms:
                add(source, term(gradient, rows))
            use.release()

        if tracer.uses:
            tracer.backward(losses, receive, retain_graph=False)

    def _report(self, tracer: Tracer, rest: Mapping[str, Leaf]) -> None:
        """Update the coverage of the parameters; ``rest`` are those measured by autograd."""
        self._coverage = {}
        operations: dict[str, set[str]] = {}
        for use in tracer.uses:
            for name in use.roots:
                operations.setdefault(name, set()).add(use.key[0])
        for name in tracer.parameters:
            if name in rest:
                why = ", ".join(sorted(tracer.uncovered.get(name) or rest[name].users))
                self._coverage[name] = f"per-sample backward: {why}"
            else:
                found = ", ".join(sorted(operations.get(name, ())))
                self._coverage[name] = f"ghost: {found}" if found else "unused"


def per_sample_gradient_norms(module: nn.Module, compute_losses: Callable[[], Tensor]) -> Tensor:
    r"""Return the norm of the gradient of each sample's own loss over all trainable parameters.

    .. math::
        n_b = \lVert \nabla_\theta \ell_b(\theta) \rVert_2

    For several batches use :class:`PerSampleGradientNorms`, which keeps what it learns about the module.

    Args:
        module: The module whose trainable parameters are measured; in eval mode if it has BatchNorm.
        compute_losses: Function that runs the module and returns the losses, (B,), with their graph.

    Returns:
        Tensor: The norms, (B,), in float32, or float64 for losses in float64.

    Raises:
        RuntimeError: If the loss of a sample depends on other samples.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> inputs = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> per_sample_gradient_norms(module, lambda: module(inputs).squeeze(1))
        tensor([5.0990, 1.0000])

    References:
        Paul et al., "Deep Learning on a Data Diet", 2021, arXiv 2107.07075, definition 2.1 (GraNd).
    """
    return PerSampleGradientNorms(module)(compute_losses)


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            f"PerSampleGradientNorms needs a parameter that requires grad, but {type(module).__name__} has none. "
            "Unfreeze some, or use a score that needs no gradients."
        )
    return parameters


def _checked(losses: object) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or len(losses) == 0:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"compute_losses must return one loss for each sample, a tensor (B,); got {found}. "
            'Use reduction="none" and average over all dimensions except the first.'
        )
    if not losses.requires_grad:
        raise ValueError(
            "compute_losses must return losses with their graph, but these do not require grad. Do not detach them, "
            "and compute them from trainable parameters of the module."
        )
    return losses


def _refuse_training_batch_norm(module: nn.Module) -> None:
    kind = nn.modules.batchnorm._BatchNorm
    for name, child in module.named_modules():
        if isinstance(child, kind) and child.training:
            raise RuntimeError(
                f"Per-sample gradient norms are undefined for {name or type(child).__name__} ({type(child).__name__}) "
                "in training mode, because each loss depends on all samples of the batch. Call module.eval() first."
            )


def _mixed(operation: str, names: set[str] | frozenset[str]) -> RuntimeError:
    return RuntimeError(
        f"The loss of one sample depends on other samples at {operation} with {', '.join(sorted(names))}, so "
        "per-sample gradients are undefined. If the module mixes samples in training mode only, call module.eval(). If "
        "the loss compares samples, or is not in the order of the samples, use a score without gradients."
    )


def _uncovered_message(uncovered: Mapping[str, str]) -> str:
    lines = "; ".join(f"{name} ({why})" for name, why in uncovered.items())
    return (
        f'PerSampleGradientNorms(fallback="raise") has no rule for: {lines}. Freeze these parameters, or use '
        'fallback="auto", which takes one backward pass per sample for them.'
    )


@contextmanager
def _plain_forward() -> Iterator[None]:
    """Disable everything that hides operations from the tracer: fused attention, compiled modules, no_grad."""
    compiled = "torch._dynamo" in sys.modules
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager") if compiled else nullcontext())
        yield


def _rewinding(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Return a function that restores the current random states of torch."""
    cpu = torch.get_rng_state()
    devices = {device: torch.cuda.get_rng_state(device) for device in {t.device for t in tensors if t.is_cuda}}

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for device, state in devices.items():
            torch.cuda.set_rng_state(state, device)

    return rewind
