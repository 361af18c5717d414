"""Steps with schedules and joined losses: two views and a classification that warms up, a translation, a VAE that anneals."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

from lightning_grad.callbacks import InfoBatch, LossReweighting, UniformLearning
from lightning_grad.functional import InseparableLossError, loss_weights
from tests.callbacks.data_pruning.test_data_pruning import scores_of, train
from tests.callbacks.data_pruning.test_rows import pruning

SAMPLES, BATCH = 20, 5


class Kind(pl.LightningModule):
    """A module whose step is written as usual, and whose losses are also known sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.build()
        self.share = 0.0  # of what warms up, as the last step had it

    def schedule(self) -> float:
        self.share = min(1.0, self.global_step / 6)  # 0 in the first step
        return self.share

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, self.schedule())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def collate(self, items: list[Any]) -> Any:
        return [torch.stack(parts) for parts in zip(*items, strict=True)]


class Views(Kind):
    """NT-Xent of two views that stand one after the other, and a classification that warms up."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.project, self.head = nn.Linear(16, 5), nn.Linear(16, 3)

    def items(self) -> list[Any]:
        return [(torch.randn(6), torch.randint(3, ())) for _ in range(SAMPLES)]

    def contrast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, others = self.net(x), self.net(0.9 * x + 0.1)
        z = F.normalize(torch.cat([self.project(features), self.project(others)]), dim=1)
        same = torch.eye(len(z), dtype=torch.bool)
        return features, (z @ z.T / 0.5).masked_fill(same, -1e4), torch.arange(len(z)).roll(len(x))

    def loss(self, batch: Any, share: float) -> Tensor:
        features, similar, places = self.contrast(batch[0])
        return F.cross_entropy(similar, places) + share * F.cross_entropy(self.head(features), batch[1])

    def losses(self, batch: Any, share: float) -> Tensor:
        features, similar, places = self.contrast(batch[0])
        pairs = F.cross_entropy(similar, places, reduction="none").reshape(2, -1).mean(0)
        return pairs + share * F.cross_entropy(self.head(features), batch[1], reduction="none")


class Translation(Kind):
    """Packed sources, padded targets, and label smoothing written by hand: a mean over all tokens that are there."""

    def build(self) -> None:
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        self.encode, self.decode = nn.GRU(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.out = nn.Linear(8, 12)

    def items(self) -> list[Any]:
        return [(torch.randint(2, 12, (2 + i % 4,)), torch.randint(2, 12, (2 + i * 3 % 5,))) for i in range(SAMPLES)]

    def collate(self, items: list[Any]) -> Any:
        sources, targets = zip(*items, strict=True)
        lengths = torch.tensor([len(source) for source in sources])
        padded = [pad_sequence(part, batch_first=True) for part in (sources, targets)]
        return {"source": padded[0], "lengths": lengths, "target": padded[1]}

    def smoothed(self, batch: Any) -> Tensor:
        packed = pack_padded_sequence(self.embed(batch["source"]), batch["lengths"], True, enforce_sorted=False)
        _, state = self.encode(packed)
        target = batch["target"]
        given = torch.cat([torch.ones_like(target[:, :1]), target[:, :-1]], 1)
        logs = self.out(self.decode(self.embed(given), state)[0]).log_softmax(-1)
        return -0.9 * logs.gather(-1, target.unsqueeze(-1)).squeeze(-1) - 0.1 * logs.mean(-1)

    def loss(self, batch: Any, share: float) -> Tensor:
        real = batch["target"].ne(0)
        return self.smoothed(batch)[real].sum() / real.sum()

    def losses(self, batch: Any, share: float) -> Tensor:
        real = batch["target"].ne(0)
        return (self.smoothed(batch) * real).sum(1) * len(real) / real.sum()

    def alone(self, batch: Any, share: float) -> Tensor:
        real = batch["target"].ne(0)
        return (self.smoothed(batch) * real).sum(1) / real.sum(1)


class Annealed(Kind):
    """A VAE whose KL is annealed, with some of it free for each dimension of each sample."""

    def build(self) -> None:
        self.encode, self.decode = nn.Linear(6, 8), nn.Linear(4, 6)

    def items(self) -> list[Any]:
        return [(torch.rand(6),) for _ in range(SAMPLES)]

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encode(batch[0]).chunk(2, 1)
        logits = self.decode(mean)
        rebuilt = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="none").sum(1)
        return rebuilt, -0.5 * (1 + log_variance - mean.square() - log_variance.exp())

    def loss(self, batch: Any, share: float) -> Tensor:
        return self.losses(batch, share).mean()

    def losses(self, batch: Any, share: float) -> Tensor:
        rebuilt, kl = self.parts(batch)
        return rebuilt + share * kl.clamp(min=0.2).sum(1)


class FreeByBatch(Annealed):
    """The same with the free part taken of the mean over the batch."""

    def loss(self, batch: Any, share: float) -> Tensor:
        rebuilt, kl = self.parts(batch)
        return rebuilt.mean() + share * kl.mean(0).clamp(min=0.2).sum()


KINDS: list[Any] = [Views, Translation, Annealed]


def loader_of(module: Any, shuffle: bool = True) -> Any:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    return DataLoader(module.items(), BATCH, shuffle, generator=generator, collate_fn=module.collate)


@pytest.mark.parametrize("kind", [Translation, Annealed])
@pytest.mark.parametrize("score", ["loss", "grand"])
def test_scores_are_those_of_the_samples(score: str, kind: Any) -> None:
    module = kind()
    values, module = scores_of(pruning(score, epoch=2), module, loader=loader_of(module), epochs=3)
    batch = module.collate(loader_of(module).dataset)
    losses = getattr(module, "alone", module.losses)(batch, 1.0)
    if score == "grand":
        found = [torch.autograd.grad(one, list(module.parameters()), retain_graph=True) for one in losses]
        losses = torch.stack([nn.utils.get_total_norm(gradients) for gradients in found])
    torch.testing.assert_close(values, losses.detach().double(), rtol=1e-3, atol=1e-5)


def test_losses_by_anchor_are_those_in_their_batches() -> None:
    module = Views()
    values, module = scores_of(pruning("loss", epoch=2), module, loader=loader_of(module, shuffle=False), epochs=3)
    parts = torch.cat([module.losses(batch, 1.0) for batch in loader_of(module, shuffle=False)])
    torch.testing.assert_close(values, parts.detach().double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_weights_is_that_by_hand(kind: Any) -> None:
    class ByHand(kind):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            shares = self.losses(batch, self.schedule())
            # What a sample has alone is known once the first batch has shown it.
            alone = getattr(self, "alone", self.losses) if self.global_step else self.losses
            return (loss_weights(alone(batch, self.share), "linupper", 0.5) * shares).sum()

    callback = LossReweighting(temperature=0.5, start_temperature=0.5, warmup_fraction=0.0)
    found, expected = kind(), ByHand()
    train(callback, found, loader=loader_of(found), epochs=3)
    train(pl.Callback(), expected, loader=loader_of(expected), epochs=3)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_infobatch_prunes_by_their_losses(kind: Any) -> None:
    module = kind()
    callback = InfoBatch(0.5, prune_until=1.0)
    run = train(callback, module, loader=loader_of(module), epochs=4)
    assert run.trainer.global_step < 16
    assert callback._values.isfinite().all()


@pytest.mark.parametrize("score", ["el2n", "aum", "forgetting", "vog", "prototypes"])
def test_the_classification_among_the_views_is_found(score: str) -> None:
    module = Views()
    callback = pruning(score, epoch=2, checkpoints=2, prune=0.0)
    train(callback, module, loader=loader_of(module), epochs=3)
    labels = torch.stack([label for _, label in loader_of(module).dataset])
    assert callback.scored.labels.tolist() == labels.tolist()
    train(UniformLearning(epoch=1), Views(), loader=loader_of(module))


@pytest.mark.parametrize("make", [lambda: pruning("loss"), lambda: InfoBatch(0.5), LossReweighting])
def test_a_part_by_the_batch_is_refused(make: Any) -> None:
    module = FreeByBatch()
    with pytest.raises(InseparableLossError, match=r"clamp \(test_fresh_steps.py:\d+\) mixes the samples"):
        train(make(), module, loader=loader_of(module))
