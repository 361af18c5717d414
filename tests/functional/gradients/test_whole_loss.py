"""A loss is whole if it is a multiple of one call, and of nothing else that depends on the samples."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.functional.gradients.whole_loss import WholeLossCapture

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 4, generator=GENERATOR), torch.tensor([0, 1, 2, 0, 1, -100])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))
        self.register_buffer("old", torch.randn(3, 4))
        self.table = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def loss(net: Net, **options: Any) -> Tensor:
    return F.cross_entropy(net(X), Y, **options)


def added_in_place(net: Net, more: Tensor) -> Tensor:
    total = torch.zeros(())
    total += loss(net)
    total += more
    return total


def changed_in_place(net: Net, more: Tensor) -> Tensor:
    total = loss(net)
    total += more
    return total


def in_a_checkpoint(net: Net) -> Tensor:
    return torch.utils.checkpoint.checkpoint(
        lambda x: F.cross_entropy(net(x), Y), X.clone().requires_grad_(), use_reentrant=True
    )


def decay(net: Net) -> Tensor:
    return sum(p.square().sum() for p in net.parameters())


WHOLE = {
    "as it is": loss,
    "a share": lambda net: loss(net) / 4,
    "twice": lambda net: 2 * loss(net),
    "a factor of the data": lambda net: loss(net) * X.abs().mean(),
    "a sum over the count": lambda net: loss(net, reduction="sum") / (Y >= 0).sum(),
    "reduced by hand": lambda net: loss(net, reduction="none").mean(),
    "reduced by hand where it counts": lambda net: loss(net, reduction="none")[Y >= 0].mean(),
    "stacked": lambda net: torch.stack([loss(net)]).mean(),
    "a python sum": lambda net: sum([loss(net)]),
    "cast": lambda net: loss(net).double().float(),
    "guarded": lambda net: loss(net).nan_to_num(0.0),
    "weight decay": lambda net: loss(net) + 0.01 * decay(net),
    "a norm": lambda net: loss(net) + net.layer.weight.norm(),
    "orthogonality": lambda net: loss(net) + (net.layer.weight @ net.layer.weight.T - torch.eye(3)).norm(),
    "distance to old weights": lambda net: loss(net) + (3 * (net.layer.weight - net.old) ** 2).sum(),
    "a learned factor": lambda net: loss(net) * (-net.factor).exp() + net.factor,
    "a detached term": lambda net: loss(net) + net(X).abs().mean().detach(),
    "in place": lambda net: added_in_place(net, net.layer.weight.square().sum()),
    "in place, on the loss": lambda net: changed_in_place(net, net.layer.weight.square().sum()),
    "reentrant checkpoint": in_a_checkpoint,
}


def metric_beside_a_loss_by_hand(net: Net) -> Tensor:
    F.mse_loss(net(X).detach(), X[:, :3])
    return -net(X).log_softmax(1).mean()


def with_data_written_into_a_constant(net: Net) -> Tensor:
    weights = torch.zeros(3)
    weights[0] = X.mean()
    return loss(net) + (weights * net.layer.bias).sum()


def focal(net: Net) -> Tensor:
    each = loss(net, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def dice(net: Net) -> Tensor:
    truth, shares = (X[:, :3] > 0).float(), net(X).sigmoid()
    return F.binary_cross_entropy_with_logits(net(X), truth) + 1 - 2 * (shares * truth).sum() / (shares + truth).sum()


class Gather(torch.autograd.Function):
    """Is called like a function of torch that is linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


MORE = {
    "a function of one's own": (lambda net: Gather.apply(loss(net)), "Gather"),
    "a term of the network": (
        lambda net: loss(net) + net(X).abs().mean(),
        r"there is also mean \(test_whole_loss.py:\d+\)",
    ),
    "a term that still counts nothing": (lambda net: loss(net) + 0.0 * net(X).abs().mean(), "mul"),
    "a term of token numbers": (lambda net: loss(net) + net.table(torch.arange(3)[Y[:3]]).square().sum(), "sum"),
    "in place": (lambda net: added_in_place(net, net(X).abs().mean()), "mean"),
    "in place, on the loss": (lambda net: changed_in_place(net, net(X).abs().mean()), "mean"),
    "a factor of the network": (lambda net: loss(net) * net(X).abs().mean(), "mean"),
    "a root": (lambda net: loss(net).sqrt(), "it goes through sqrt"),
    "a quotient": (lambda net: 1 / loss(net), "Reciprocal|div"),
    "a mask": (
        lambda net: (loss(net, reduction="none") * (Y > 0)).sum() / (Y > 0).sum(),
        "its positions are multiplied",
    ),
    "the hardest": (lambda net: loss(net, reduction="none").topk(2).values.mean(), "topk"),
    "focal": (focal, "mul"),
    "dice": (dice, "div|rsub|mul"),
    "a metric": (metric_beside_a_loss_by_hand, "mean|neg"),
    "data in a constant": (with_data_written_into_a_constant, "sum|mul"),
}


def rest_of(step: Any) -> str | None:
    torch.manual_seed(0)
    net = Net()
    with WholeLossCapture(net, 6) as capture:
        output = step(net)
    return capture.rest_of(output, capture.only())


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_the_same_for_all_samples_is_no_part(name: str) -> None:
    assert rest_of(WHOLE[name]) is None


@pytest.mark.parametrize("name", MORE)
def test_what_else_there_is(name: str) -> None:
    step, words = MORE[name]
    found = rest_of(step)
    assert found is not None
    assert re.search(words, found), found


def test_the_value_of_the_step_is_its_own() -> None:
    net = Net()
    with WholeLossCapture(net, 6):
        seen = loss(net)
    assert torch.equal(seen, loss(net))
