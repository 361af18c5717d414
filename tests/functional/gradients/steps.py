"""Training steps of many kinds of projects, written as such projects write them, with what their samples contribute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, NegativeBinomial, Normal, kl_divergence

Batch = dict[str, Any]


class Project(nn.Module):
    """A module with a step that returns one loss, and the shares of its samples for comparison."""

    smallest = 1
    is_noisy = False
    sample_loss: str | None = "share"

    def training_step(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def shares(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def constant(self) -> Tensor | float:
        return 0.0

    def dataset(self) -> list[Batch]:
        raise NotImplementedError

    def collate(self, items: list[Batch]) -> Batch:
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class QuantileLoss(nn.Module):
    """A metric object that returns losses, to be reduced by whoever calls."""

    quantiles = (0.1, 0.5, 0.9)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        losses = []
        for i, q in enumerate(self.quantiles):
            errors = target - prediction[..., i]
            losses.append(torch.max((q - 1) * errors, q * errors).unsqueeze(-1))
        return 2 * torch.cat(losses, dim=2)


class QuantileForecaster(Project):
    """Quantiles of a horizon, padded to the longest, with weights of the series."""

    sample_loss = None  # the weights of the batch are normalized

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 8, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.metric = QuantileLoss()

    def dataset(self) -> list[Batch]:
        return [
            {"x": torch.randn(7, 2), "y": torch.randn(7), "length": torch.tensor(i + 2), "weight": torch.rand(())}
            for i in range(6)
        ]

    def losses(self, batch: Batch) -> Tensor:
        hidden, _ = self.rnn(batch["x"])
        losses = self.metric.loss(self.head(hidden), batch["y"]).mean(-1)
        mask = torch.arange(7)[None] < batch["length"][:, None]
        return losses.masked_fill(~mask, 0.0) * (batch["weight"] / batch["weight"].mean())[:, None]

    def training_step(self, batch: Batch) -> Tensor:
        loss = self.losses(batch).sum() / batch["length"].sum()
        return loss

    def shares(self, batch: Batch) -> Tensor:
        return self.losses(batch).sum(1) * len(batch["x"]) / batch["length"].sum()


class ScaledForecaster(Project):
    """Mean absolute error of a series scaled by its own statistics, observed in part."""

    sample_loss = "own"

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 4))

    def dataset(self) -> list[Batch]:
        observed = [torch.tensor([1.0, 1.0, float(i % 2), float(i > 2)]) for i in range(6)]
        return [{"past": torch.randn(9) * (i + 1), "future": torch.randn(4), "observed": observed[i]} for i in range(6)]

    def errors(self, batch: Batch) -> Tensor:
        loc, scale = batch["past"].mean(-1, keepdim=True), batch["past"].std(-1, keepdim=True) + 1e-5
        forecast = self.net((batch["past"] - loc) / scale) * scale + loc
        return torch.abs(forecast - batch["future"])

    def training_step(self, batch: Batch) -> Tensor:
        weights = batch["observed"]
        return (self.errors(batch) * weights).sum() / weights.sum().clamp(min=1.0)

    def shares(self, batch: Batch) -> Tensor:
        weights = batch["observed"]
        return (self.errors(batch) * weights).sum(1) * len(weights) / weights.sum()


class MoleculeNetwork(Project):
    """Messages along bonds, atoms pooled by molecule, several properties of which some are not measured."""

    sample_loss = "own"

    def __init__(self) -> None:
        super().__init__()
        self.atoms = nn.Embedding(5, 8)
        self.message = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def dataset(self) -> list[Batch]:
        molecules = []
        for i in range(6):
            count = i % 4 + 2
            bonds = torch.stack([torch.arange(count - 1), torch.arange(1, count)])
            target = torch.randn(3)
            target[i % 3] = float("nan") if i % 2 else 0.5
            molecules.append(
                {"z": torch.randint(5, (count,)), "bonds": torch.cat([bonds, bonds.flip(0)], 1), "y": target}
            )
        return molecules

    def collate(self, items: list[Batch]) -> Batch:
        counts = [len(item["z"]) for item in items]
        starts = [sum(counts[:i]) for i in range(len(items))]
        return {
            "z": torch.cat([item["z"] for item in items]),
            "bonds": torch.cat([item["bonds"] + s for item, s in zip(items, starts, strict=True)], 1),
            "batch": torch.arange(len(items)).repeat_interleave(torch.tensor(counts)),
            "y": torch.stack([item["y"] for item in items]),
        }

    def forward(self, batch: Batch) -> Tensor:
        h, (source, target) = self.atoms(batch["z"]), batch["bonds"]
        for _ in range(2):
            messages = F.silu(self.message(torch.cat([h[source], h[target]], dim=-1)))
            h = self.norm(h + torch.zeros_like(h).index_add_(0, target, messages))
        size = len(batch["y"])
        pooled = h.new_zeros(size, h.size(1)).scatter_add_(0, batch["batch"][:, None].expand_as(h), h)
        return self.head(pooled / torch.bincount(batch["batch"], minlength=size).clamp(min=1)[:, None])

    def training_step(self, batch: Batch) -> Tensor:
        is_labeled = ~batch["y"].isnan()
        return F.l1_loss(self(batch)[is_labeled], batch["y"][is_labeled])

    def shares(self, batch: Batch) -> Tensor:
        is_labeled = ~batch["y"].isnan()
        errors = (self(batch) - batch["y"].nan_to_num()).abs() * is_labeled
        return errors.sum(1) * len(is_labeled) / is_labeled.sum()


class CellAutoencoder(Project):
    """An ELBO of counts: negative binomial likelihood, a sample of the latent, a weight of the KL that warms up."""

    is_noisy = True
    sample_loss = None

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 8)
        self.decoder = nn.Linear(4, 12)
        self.log_dispersion = nn.Parameter(torch.zeros(12))
        self.kl_weight = 0.25

    def dataset(self) -> list[Batch]:
        return [{"x": torch.randint(0, 9, (12,)).float()} for _ in range(6)]

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = batch["x"]
        library = x.sum(1, keepdim=True).clamp(min=1.0)
        mean, log_std = self.encoder(torch.log1p(x)).chunk(2, dim=-1)
        q = Normal(mean, log_std.exp(), validate_args=False)
        rate = library * self.decoder(q.rsample()).softmax(dim=-1)
        dispersion = self.log_dispersion.exp()
        logits = (rate + 1e-8).log() - dispersion.log()
        p = NegativeBinomial(dispersion, logits=logits, validate_args=False)
        return -p.log_prob(x).sum(-1), kl_divergence(q, Normal(0.0, 1.0)).sum(dim=1)

    def training_step(self, batch: Batch) -> Tensor:
        reconstruction, kl = self.terms(batch)
        return torch.mean(reconstruction + self.kl_weight * kl)

    def shares(self, batch: Batch) -> Tensor:
        reconstruction, kl = self.terms(batch)
        return reconstruction + self.kl_weight * kl


class TabularHeads(Project):
    """Embeddings of categories next to numbers, and heads for a class, labels and a value; L1 of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(4, 3), nn.Embedding(6, 3)])
        self.body = nn.Sequential(nn.Linear(11, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.heads = nn.ModuleDict({"class": nn.Linear(16, 4), "labels": nn.Linear(16, 3), "value": nn.Linear(16, 1)})

    def dataset(self) -> list[Batch]:
        return [
            {
                "numbers": torch.randn(5),
                "categories": torch.tensor([i % 4, i % 6]),
                "class": torch.tensor(i % 4),
                "labels": torch.randint(2, (3,)).float(),
                "value": torch.randn(()),
            }
            for i in range(6)
        ]

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        columns = [e(batch["categories"][:, i]) for i, e in enumerate(self.embeddings)]
        hidden = self.body(torch.cat([batch["numbers"], *columns], dim=1))
        return {name: head(hidden) for name, head in self.heads.items()}

    def training_step(self, batch: Batch) -> Tensor:
        out = self.outputs(batch)
        losses = {
            "class": F.cross_entropy(out["class"], batch["class"], label_smoothing=0.1),
            "labels": nn.BCEWithLogitsLoss()(out["labels"], batch["labels"]),
            "value": F.huber_loss(out["value"].squeeze(-1), batch["value"]),
        }
        return sum(losses.values()) + 1e-3 * self.body[0].weight.abs().sum()

    def constant(self) -> Tensor:
        return 1e-3 * self.body[0].weight.abs().sum()

    def shares(self, batch: Batch) -> Tensor:
        out = self.outputs(batch)
        return (
            F.cross_entropy(out["class"], batch["class"], label_smoothing=0.1, reduction="none")
            + F.binary_cross_entropy_with_logits(out["labels"], batch["labels"], reduction="none").mean(1)
            + F.huber_loss(out["value"].squeeze(-1), batch["value"], reduction="none")
        )


class LanguageModel(Project):
    """Next tokens, with logits and losses computed in chunks, prompts and padding ignored, and a router's balance."""

    sample_loss = None

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.router = nn.Linear(8, 4)

    def dataset(self) -> list[Batch]:
        items = []
        for i in range(6):
            tokens = torch.randint(11, (9,))
            labels = tokens.clone()
            labels[: i % 3] = -100
            labels[9 - i % 2 :] = -100
            items.append({"tokens": tokens, "labels": labels})
        return items

    def losses(self, batch: Batch, chunk: int = 16) -> tuple[Tensor, Tensor]:
        hidden, _ = self.mix(self.embed(batch["tokens"]))
        targets = batch["labels"][..., 1:].reshape(-1)
        flat = hidden[:, :-1].reshape(-1, hidden.size(-1))
        pieces = [
            F.cross_entropy(self.head(h), t, ignore_index=-100, reduction="none")
            for h, t in zip(flat.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat(pieces), self.router(hidden).softmax(-1)

    def training_step(self, batch: Batch) -> Tensor:
        losses, gates = self.losses(batch)
        count = (batch["labels"][..., 1:] != -100).sum()
        used = F.one_hot(gates.argmax(-1), 4).to(gates.dtype).mean(dim=(0, 1))
        return losses.sum() / torch.maximum(count, torch.tensor(1)) + 0.04 * (used * gates.mean(dim=(0, 1))).sum()

    def shares(self, batch: Batch) -> Tensor:
        losses, gates = self.losses(batch)
        count = (batch["labels"][..., 1:] != -100).sum()
        used = F.one_hot(gates.argmax(-1), 4).to(gates.dtype).mean(dim=(0, 1))
        size = len(batch["tokens"])
        return losses.reshape(size, -1).sum(1) * size / count + 0.04 * gates.mean(1) @ used


class MaskedForecaster(Project):
    """A masked autoencoder of patches of a series, scored on the patches that it did not see."""

    sample_loss = "own"

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.decode = nn.Linear(8, 4)

    def dataset(self) -> list[Batch]:
        return [{"x": torch.randn(24), "hidden": torch.arange(6) % (i % 3 + 2) == 0} for i in range(6)]

    def patch_errors(self, batch: Batch) -> Tensor:
        patches = batch["x"].unfold(-1, 4, 4)
        hidden = batch["hidden"].unsqueeze(-1)
        tokens = torch.where(hidden, self.token.expand(*hidden.shape[:2], -1), self.patch(patches)) + self.position
        return ((self.decode(self.block(tokens)) - patches) ** 2).mean(dim=-1)

    def training_step(self, batch: Batch) -> Tensor:
        loss, mask = self.patch_errors(batch), batch["hidden"].float()
        return (loss * mask).sum() / mask.sum()

    def shares(self, batch: Batch) -> Tensor:
        mask = batch["hidden"].float()
        return (self.patch_errors(batch) * mask).sum(1) * len(mask) / mask.sum()


class PolicyGradient(Project):
    """REINFORCE, the advantage normalized by the batch, with an entropy bonus."""

    sample_loss = None
    smallest = 2  # one reward has no deviation

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))

    def dataset(self) -> list[Batch]:
        return [{"state": torch.randn(5), "action": torch.tensor(i % 3), "reward": torch.randn(())} for i in range(6)]

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        policy = Categorical(logits=self.policy(batch["state"]))
        advantage = (batch["reward"] - batch["reward"].mean()) / (batch["reward"].std() + 1e-8)
        return policy.log_prob(batch["action"]), advantage, policy.entropy()

    def training_step(self, batch: Batch) -> Tensor:
        log_prob, advantage, entropy = self.terms(batch)
        return -(log_prob * advantage).mean() - 0.01 * entropy.mean()

    def shares(self, batch: Batch) -> Tensor:
        log_prob, advantage, entropy = self.terms(batch)
        return -log_prob * advantage - 0.01 * entropy


class ProximalPolicy(Project):
    """PPO: clipped ratio, clipped value, entropy, on a shared network; the loss in pieces with +=."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16), nn.Tanh())
        self.actor, self.critic = nn.Linear(16, 3), nn.Linear(16, 1)

    def dataset(self) -> list[Batch]:
        return [
            {
                "state": torch.randn(5),
                "action": torch.tensor(i % 3),
                "old": -torch.rand(()) - 0.5,
                "advantage": torch.randn(()),
                "returns": torch.randn(()),
                "value": torch.randn(()),
            }
            for i in range(6)
        ]

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.body(batch["state"])
        policy, value = Categorical(logits=self.actor(hidden)), self.critic(hidden).view(-1)
        ratio = torch.exp(policy.log_prob(batch["action"]) - batch["old"])
        surrogate = torch.min(ratio * batch["advantage"], ratio.clamp(0.8, 1.2) * batch["advantage"])
        clipped = batch["value"] + torch.clamp(value - batch["value"], -0.2, 0.2)
        values = torch.maximum((value - batch["returns"]) ** 2, (clipped - batch["returns"]) ** 2)
        return surrogate, values, policy.entropy()

    def training_step(self, batch: Batch) -> Tensor:
        surrogate, values, entropy = self.terms(batch)
        loss = -surrogate.mean()
        loss += 0.5 * values.mean() * 0.5
        loss -= 0.01 * entropy.mean()
        return loss

    def shares(self, batch: Batch) -> Tensor:
        surrogate, values, entropy = self.terms(batch)
        return -surrogate + 0.25 * values - 0.01 * entropy


class Detector(Project):
    """A loop over images with different numbers of objects; two losses in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.boxes, self.classes = nn.Linear(4, 4), nn.Linear(4, 5)

    def dataset(self) -> list[Batch]:
        return [
            {"image": torch.randn(3, 6, 6), "boxes": torch.rand(i % 3 + 1, 4), "labels": torch.randint(5, (i % 3 + 1,))}
            for i in range(6)
        ]

    def collate(self, items: list[Batch]) -> Batch:
        return {"image": torch.stack([i["image"] for i in items]), "targets": items}

    def losses(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        features = self.body(batch["image"]).flatten(2)
        boxes, classes = [], []
        for feature, target in zip(features, batch["targets"], strict=True):
            found = feature.T[: len(target["labels"])]
            boxes.append(F.smooth_l1_loss(self.boxes(found), target["boxes"]))
            classes.append(F.cross_entropy(self.classes(found), target["labels"]))
        return boxes, classes

    def training_step(self, batch: Batch) -> Tensor:
        boxes, classes = self.losses(batch)
        losses = {"boxes": torch.stack(boxes).mean(), "classes": sum(classes) / len(classes)}
        return sum(losses.values())

    def shares(self, batch: Batch) -> Tensor:
        boxes, classes = self.losses(batch)
        return torch.stack(boxes) + torch.stack(classes)


PROJECTS: dict[str, type[Project]] = {
    kind.__name__: kind
    for kind in (
        QuantileForecaster,
        ScaledForecaster,
        MoleculeNetwork,
        CellAutoencoder,
        TabularHeads,
        LanguageModel,
        MaskedForecaster,
        PolicyGradient,
        ProximalPolicy,
        Detector,
    )
}
