"""The rules of learning rates: numbers by hand, and every optimizer of torch."""

import pytest
import torch

from lightning_grad.functional import lr_scaling_factor, lr_scaling_rule

UNKNOWN = {"Adadelta", "Adagrad", "LBFGS", "Rprop", "SparseAdam", "Optimizer"}


@pytest.mark.parametrize(("batch", "linear", "root"), [(8, 1.0, 1.0), (32, 4.0, 2.0), (4, 0.5, 0.5**0.5)])
def test_numbers_by_hand(batch: int, linear: float, root: float) -> None:
    assert lr_scaling_factor(batch, 8, "linear") == linear
    assert lr_scaling_factor(batch, 8, "sqrt") == root


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0)])
def test_no_batch_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        lr_scaling_factor(*sizes, "linear")


def test_every_optimizer_of_torch_has_a_rule_or_is_known_to_have_none() -> None:
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)]
    assert {kind.__name__ for kind in kinds if lr_scaling_rule(kind) is None} <= UNKNOWN
    assert {kind.__name__ for kind in kinds if lr_scaling_rule(kind) == "linear"} == {"SGD", "ASGD"}


@pytest.mark.parametrize(
    ("name", "rule"),
    [("Lion", "sqrt"), ("Muon", "sqrt"), ("SGD8bit", "linear"), ("SGDScheduleFree", "linear"), ("Prodigy", None)],
)
def test_classes_of_libraries_are_known_by_name(name: str, rule: str | None) -> None:
    assert lr_scaling_rule(type(name, (torch.optim.Optimizer,), {})) == rule
