"""Attention logits are those of attention, however it is written; any other softmax is not taken for it."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import GradientMonitor
from lightning_grad.callbacks.diagnostics._logits import LogitProbe
from lightning_grad.testing import make_trainer

BATCH, TOKENS, WIDTH, HEADS = 3, 5, 8, 2


class Layers(nn.Module):
    """What attention and classifiers are made of, and the ways to write both."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.codebook = nn.Parameter(torch.randn(6, WIDTH))
        self.register_buffer("prototypes", torch.randn(6, WIDTH))
        self.logits: list[Tensor] = []

    def heads(self, x: Tensor) -> list[Tensor]:
        rows = (layer(x).view(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return list(rows)

    def keep(self, logits: Tensor) -> Tensor:
        self.logits.append(logits.detach())
        return logits

    # Attention.

    def by_matmul(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.keep(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v

    def by_einsum(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = self.keep(torch.einsum("bhqd,bhkd->bhqk", q, k))
        return torch.einsum("bhqk,bhkd->bhqd", F.dropout(scores.softmax(-1), 0.2), v)

    def masked_capped_and_cast(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = 30.0 * torch.tanh(q @ k.mT / 30.0)
        hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        self.keep(scores[scores.isfinite()])
        return F.softmax(scores, -1, dtype=torch.float64).to(v.dtype) @ v

    def in_place(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.heads(x))
        scores = torch.zeros(BATCH * HEADS, TOKENS, TOKENS)
        scores.copy_(torch.bmm(q, k.mT)).mul_(0.25).add_(0.5)
        return torch.bmm(self.keep(scores.clone()).softmax(-1), v)

    def multihead(self, x: Tensor) -> Tensor:
        self._keep_multihead(x)
        return self.attention(x, x, x)[0]

    def multihead_fused(self, x: Tensor) -> Tensor:
        self._keep_multihead(x)
        return self.attention(x, x, x, need_weights=False)[0]

    def _keep_multihead(self, x: Tensor) -> None:
        with torch.no_grad():
            packed = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
            q, k, _ = (t.view(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for t in packed.chunk(3, -1))
            self.keep(q @ k.mT / math.sqrt(WIDTH // HEADS))

    def fused(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        self.keep(q @ k.mT / math.sqrt(q.shape[-1]))
        return F.scaled_dot_product_attention(q, k, v)

    def fused_in_parts(self, x: Tensor) -> Tensor:
        """What torch makes of it where no kernel is fused."""
        q, k, v = self.heads(x)
        self.keep(q @ k.mT / math.sqrt(q.shape[-1]))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    # No attention.

    def metric(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(-1).max(-1).values

    def metric_behind_attention(self, x: Tensor) -> Tensor:
        """Features of an attention are products of activations too; those are not scores."""
        return (50.0 * self.head(self.by_matmul(x).transpose(1, 2).flatten(2))).softmax(-1)

    def class_probabilities_in_a_product(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(-1) @ torch.randn(4, 7)

    def gate_of_experts(self, x: Tensor) -> Tensor:
        outputs = torch.stack([layer(x) for layer in (self.query, self.key, self.value, self.query)], -2)
        return torch.einsum("bte,bted->btd", self.head(x).softmax(-1), outputs)

    def without_a_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight.double().float()).softmax(-1) @ torch.randn(4, 7)

    def soft_codes(self, x: Tensor) -> Tensor:
        return (x @ self.codebook.T).softmax(-1) @ self.codebook

    def soft_prototypes(self, x: Tensor) -> Tensor:
        return (x @ self.prototypes.T).softmax(-1) @ self.prototypes

    def matching_of_pairs(self, x: Tensor) -> Tensor:
        """Products of activations, as in contrastive learning, whose softmax is looked at."""
        return (self.query(x[:, 0]) @ self.key(x[:, 1]).T).softmax(-1).diagonal().mean()

    def convolution(self, x: Tensor) -> Tensor:
        return F.conv1d(self.query(x) @ self.key(x).mT, torch.ones(2, TOKENS, 1, requires_grad=True)).softmax(1)


ATTENTION = [
    Layers.by_matmul,
    Layers.by_einsum,
    Layers.masked_capped_and_cast,
    Layers.in_place,
    Layers.multihead,
    Layers.multihead_fused,
    Layers.fused,
    Layers.fused_in_parts,
]
OTHERS = [
    Layers.metric,
    Layers.class_probabilities_in_a_product,
    Layers.gate_of_experts,
    Layers.without_a_bias,
    Layers.soft_codes,
    Layers.soft_prototypes,
    Layers.matching_of_pairs,
    Layers.convolution,
]


def probed(how: Callable[[Layers, Tensor], Any], layers: Layers) -> dict[str, float]:
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4))
    with LogitProbe(layers) as probe:
        how(layers, x)
    return {name: value.item() for name, value in probe.read().items()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("how", ATTENTION, ids=lambda how: how.__name__)
def test_attention_is_recognized_however_it_is_written(how, autocast):
    layers = Layers()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        seen = probed(how, layers)
    largest = max(logits.max().item() for logits in layers.logits)
    assert seen == {"attention_logit_max": pytest.approx(largest, rel=0.02 if autocast else 1e-5)}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("how", OTHERS, ids=lambda how: how.__name__)
def test_another_softmax_is_not_taken_for_attention(how, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert probed(how, Layers()) == {}


def test_a_metric_beside_attention_does_not_count():
    layers = Layers()
    seen = probed(Layers.metric_behind_attention, layers)
    (scores,) = layers.logits
    assert seen["attention_logit_max"] == pytest.approx(scores.max().item())


def test_of_several_attentions_the_largest_logit_counts():
    layers = Layers()
    seen = probed(lambda model, x: (model.by_matmul(3 * x), model.fused(x), model.metric(x)), layers)
    assert seen["attention_logit_max"] == pytest.approx(max(logits.max().item() for logits in layers.logits))


def test_weights_that_are_made_in_the_step_are_still_weights():
    layers = Layers()
    nn.utils.parametrizations.weight_norm(layers.head)
    assert probed(Layers.class_probabilities_in_a_product, layers) == {}


class WithMetric(pl.LightningModule):
    """A classifier that takes a softmax for a metric, and perhaps has an attention."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        if self.attends:
            x = x + self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        logits = self.head(x)
        self.log("confidence", logits.softmax(-1).amax(-1).mean())
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("attends", [False, True])
def test_a_fit_logs_attention_logits_only_with_attention(attends):
    data = TensorDataset(torch.randn(16, 4), torch.arange(16) % 3)
    arguments = {"max_epochs": 1, "log_every_n_steps": 1, "callbacks": [GradientMonitor(figure=False)]}
    trainer = make_trainer(**arguments)
    trainer.fit(WithMetric(attends), DataLoader(data, 8))
    logged = {key for key in trainer.callback_metrics if "logit" in key}
    assert logged == {"grad/output_logit_max", *(["grad/attention_logit_max"] if attends else [])}
