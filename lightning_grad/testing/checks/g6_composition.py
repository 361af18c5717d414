"""G6: the callback works with what Lightning offers, or refuses it before the first batch."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_grad.testing.checks.registry import GuaranteeError, check
from lightning_grad.testing.checks.trained import assert_trained, premise, works_or_refuses
from lightning_grad.testing.lines import line_of_error
from lightning_grad.testing.ranks import on_ranks
from lightning_grad.testing.rows import REFUSES
from lightning_grad.testing.states import assert_identical
from lightning_grad.testing.subject import Arguments, NotApplicableError, RefusedError, Subject

_LIMIT = 40.0  # seconds for both ranks; they take one or two
_INITIAL_SCALE = 2.0**40  # of a loss, whose gradients then overflow

# Arguments of the Trainer; each is one object, because runs are kept by it.
_ACCUMULATION: Arguments = partial(dict, accumulate_grad_batches=3, max_epochs=2)
_BF16_MIXED: Arguments = partial(dict, precision="bf16-mixed", max_epochs=2)
_BF16_TRUE: Arguments = partial(dict, precision="bf16-true", max_epochs=2)
_CLIPPING: Arguments = partial(dict, gradient_clip_val=0.5, max_epochs=2)
_SHORT: Arguments = partial(dict, max_steps=10, max_epochs=-1, val_check_interval=2)
_NO_VALIDATION: Arguments = partial(dict, limit_val_batches=0, max_epochs=2)
_FAST_DEV_RUN: Arguments = partial(dict, fast_dev_run=True)
_DDP: Arguments = partial(dict, strategy="ddp", devices=2, max_epochs=2)


@check("quick", feature="accumulation")
def g6_accumulation(subject: Subject) -> str:
    """``Trainer(accumulate_grad_batches=3)``."""
    return works_or_refuses(subject, _ACCUMULATION)


@check("quick", feature="bf16")
def g6_bf16_mixed(subject: Subject) -> str:
    """``Trainer(precision="bf16-mixed")``."""
    return works_or_refuses(subject, _BF16_MIXED)


@check("full", feature="bf16")
def g6_bf16_true(subject: Subject) -> str:
    """``Trainer(precision="bf16-true")``."""
    return works_or_refuses(subject, _BF16_TRUE)


@check("full", feature="fp16")
def g6_fp16_with_overflow(subject: Subject) -> str:
    """An fp16 GradScaler whose first steps overflow."""
    words = works_or_refuses(subject, _fp16)
    if premise(subject, _fp16).trainer.precision_plugin.scaler.get_scale() == _INITIAL_SCALE:
        raise NotApplicableError("No gradient of the module overflows.")
    return words


@check("full", feature="gradient_clip_val")
def g6_gradient_clip_val(subject: Subject) -> str:
    """``Trainer(gradient_clip_val=0.5)``."""
    return works_or_refuses(subject, _CLIPPING)


@check("full")
def g6_max_steps_and_val_check_interval(subject: Subject) -> str:
    """A run that validates at every second batch, and ends in mid-epoch by ``max_steps``."""
    return works_or_refuses(subject, _SHORT)


@check("full")
def g6_no_validation(subject: Subject) -> str:
    """``Trainer(limit_val_batches=0)``, so no metric of a validation is logged."""
    return works_or_refuses(subject, _NO_VALIDATION)


@check("full")
def g6_fast_dev_run(subject: Subject) -> str:
    """``Trainer(fast_dev_run=True)``."""
    return works_or_refuses(subject, _FAST_DEV_RUN)


@check("quick", feature="manual_optimization")
def g6_manual_optimization_with_two_optimizers(subject: Subject) -> str:
    """A module that steps two optimizers itself."""
    return works_or_refuses(subject.on("manual_optimization"))


@check("full", feature="no_second_moment")
def g6_optimizer_without_second_moment(subject: Subject) -> str:
    """SGD with momentum."""
    return works_or_refuses(subject.on("no_second_moment"))


@check("full")
def g6_frozen_parameters(subject: Subject) -> str:
    """Parameters that the module has frozen, half of its children, stay what they are."""
    words = works_or_refuses(subject, change=_freeze_half_the_children)
    if words:
        return words
    change = _freeze_half_the_children
    run, plain = subject.situated(dict, change), premise(subject, dict, change)
    for name, parameter in plain.module.named_parameters():  # the callback may have thawed its own
        if not parameter.requires_grad:
            assert_identical(plain.weights[name], run.weights[name], f"frozen {name}")
    return ""


@check("full", feature="compiled")
def g6_compiled_submodules(subject: Subject) -> str:
    """With children compiled by the backend ``"eager"``, the weights are those of a run without a compiler, up to 1e-6."""
    words = works_or_refuses(subject, change=_compile_children)
    if not words:
        compiled, eager = subject.situated(dict, _compile_children), subject.bare()
        for name, value in compiled.weights.items():
            if not torch.allclose(value, eager.weights[name.replace("_orig_mod.", "")], atol=1e-6):
                raise GuaranteeError(f"{name} differs from the run without a compiler.")
    return words


@check("full", feature="pytorch_lightning")
def g6_pytorch_lightning(subject: Subject) -> str:
    """Under ``pytorch_lightning.Trainer`` the weights are bitwise those under ``lightning.pytorch.Trainer``."""
    try:
        importlib.import_module("pytorch_lightning")
    except ImportError as error:
        raise NotApplicableError("pytorch_lightning is not installed.") from error
    other = subject.on("pytorch_lightning")
    words = works_or_refuses(other, _pytorch_lightning, usual=subject)
    if not words:
        assert_identical(subject.bare().weights, other.situated(_pytorch_lightning).weights, "weights")
    return words


@check("full", feature="ddp")
def g6_two_ranks(subject: Subject) -> str:
    """On two processes with DDP, both end with the same weights."""
    if "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise NotApplicableError("Processes cannot be forked here: there is no fork, or CUDA is in use.")
    for each in (subject, subject.plain):
        assert each.root.exists()  # made here, because the ranks end without removing theirs
    try:
        first, second = on_ranks(2, train_on_this_rank, subject, limit=_LIMIT)
    except AssertionError as error:
        lost = [part.split(" ---")[0] for part in str(error).split("--- rank ")[1:]]
        raise GuaranteeError(f"Rank {' and '.join(lost)} did not end in {_LIMIT:.0f} s, or was killed.") from error
    failed = {rank: found for rank, found in enumerate((first, second)) if isinstance(found, Failed)}
    # If a rank fails, the other waits for it until the connection is lost, in code of no callback.
    for rank, found in sorted(failed.items(), key=lambda item: not item[1].line):
        if found.not_applicable:
            raise NotApplicableError(found.words)
        raise GuaranteeError(f"On rank {rank}: {found.words}", found.line)
    assert_identical(first, second, "weights on the other rank")
    return str(first) if isinstance(first, str) else ""


class Failed(NamedTuple):
    """The error of a rank, in a form that other processes can read."""

    words: str
    line: str
    not_applicable: bool


def train_on_this_rank(subject: Subject) -> Mapping[str, Tensor] | str | Failed:
    """Train under DDP on each of two ranks; return the parameters of this one, or the words of a refusal or an error."""
    try:
        plain = premise(subject, _DDP)
        run = subject.situated(_DDP)
        assert_trained(run, plain)
    except RefusedError as refusal:
        return f"{REFUSES}{refusal}"
    except (Exception, SystemExit) as error:
        words = (
            str(error) if isinstance(error, AssertionError | NotApplicableError) else f"{type(error).__name__}: {error}"
        )
        return Failed(words, line_of_error(error, subject.kind), isinstance(error, NotApplicableError))
    return {name: value.detach() for name, value in run.module.named_parameters()}


def _fp16() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=_INITIAL_SCALE, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "max_epochs": 2}


def _pytorch_lightning() -> dict[str, Any]:
    return {"trainer_class": importlib.import_module("pytorch_lightning").Trainer}


def _freeze_half_the_children(module: Any) -> None:
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(children) < 2:
        raise NotApplicableError("The module has no two children with parameters.")
    for child in children[: len(children) // 2]:
        child.requires_grad_(False)


def _compile_children(module: Any) -> None:
    torch._dynamo.reset()
    for child in module.children():
        child.compile(backend="eager")
