"""The second validation under other precisions, on several ranks, and beside other callbacks."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialTraining, NMSparsity
from lightning_grad.callbacks.adversarial import adversarial_evaluation
from lightning_grad.core.quiet import is_quiet
from lightning_grad.testing import assert_identical, state_of
from tests.callbacks.adversarial.attacked import CLASSES, At, Tape, as_batches, half_precision
from tests.callbacks.adversarial.test_adversarial_composition import Attentive as AttentiveClassifier
from tests.callbacks.adversarial.test_adversarial_evaluation import (
    LogsMetrics,
    Net,
    attack,
    evaluator,
    fit,
    loader,
    parted,
    share_of_right,
    validate,
)

# Precision.


class Tokens(Net):
    """Classifies sentences of words."""

    def build(self) -> None:
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, CLASSES)

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.words(tokens)

    def classified(self, embedded: Tensor) -> Tensor:
        return self.head(embedded.mean(1).relu())

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        embedded = self.embedded(batch[0])
        logits = self.classified(embedded)
        self.log("val_acc", share_of_right(logits, batch[1]))
        self.log("size", embedded.norm())
        return F.cross_entropy(logits, batch[1])


def sentences() -> Any:
    tokens = torch.randint(9, (20, 5), generator=torch.Generator().manual_seed(1))
    return as_batches([[tokens[i : i + 8], tokens[i : i + 8, 0] % CLASSES] for i in range(0, 20, 8)])


PRECISIONS: dict[str, Any] = {
    "full": dict,
    "bf16": lambda: {"precision": "bf16-mixed"},
    "fp16": lambda: {"plugins": half_precision(1024.0)},
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("make", [Net, LogsMetrics, Tokens])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str, make: Any, inference: bool) -> None:
    arguments = {**PRECISIONS[precision](), "inference_mode": inference}
    loaders = sentences() if make is Tokens else loader()
    clean, attacked = parted(validate([evaluator()], make(), loaders, **arguments))
    assert_identical(clean, validate([], make(), loaders, **arguments))
    assert attacked["val_acc"] < clean["val_acc"]
    if make is not Tokens:
        kind = {"full": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
            batches = attack(make(), [loader()])
        torch.testing.assert_close(attacked, validate([], make(), batches, **arguments), rtol=1e-2, atol=1e-2)


class Cached(MixedPrecision):
    """Keeps the weights that it has cast, as torch does and Lightning does not."""

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=True)


@pytest.mark.parametrize("make", [Net, Tokens])
def test_weights_that_were_cast_without_gradients_do_not_serve_the_attack(make: Any) -> None:
    loaders = sentences() if make is Tokens else loader()
    found = [
        validate([evaluator()], make(), loaders, plugins=[plugin("bf16-mixed", "cpu")])
        for plugin in (MixedPrecision, Cached)
    ]
    assert_identical(*found)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_fit_in_other_precisions_is_untouched(precision: str) -> None:
    left = []
    for callbacks in ([], [evaluator()]):
        module = LogsMetrics()
        trainer = fit(callbacks, module, **PRECISIONS[precision]())
        scaler = trainer.precision_plugin.scaler.state_dict() if precision == "fp16" else {}
        left.append([state_of(trainer, module), parted(dict(trainer.callback_metrics))[0], scaler])
    assert_identical(*left)


# Embeddings, and compiled code.


def test_embeddings_are_attacked_by_hand() -> None:
    class Linear(Tokens):
        def classified(self, embedded: Tensor) -> Tensor:
            return F.pad(embedded.sum((1, 2)).unsqueeze(1), (0, CLASSES - 1))

    def by_hand(sign: int) -> Tensor:
        return torch.cat([module.words(t) - sign * 0.1 * ((y == 0) * 2 - 1).view(-1, 1, 1) for t, y in sentences()])

    module = Linear()
    found = validate([evaluator(0.1, steps=1, random_start=False)], module, sentences())
    sizes = by_hand(1).detach().split([8, 8, 4])
    # A batch's mean counts as many times as it has samples.
    expected = sum(size.norm() * len(size) for size in sizes) / 20
    assert found["adversarial/size"] == pytest.approx(expected.item(), rel=1e-5)


def test_compiled_networks_are_run_eagerly_in_the_attack() -> None:
    torch._dynamo.reset()
    ran: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def compiled(*args: Any) -> Any:
            ran.append(
                "quiet" if is_quiet(module) else "second" if module in adversarial_evaluation._SECOND else "clean"
            )
            return graph.forward(*args)

        return compiled

    class Body(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    eager, module = LogsMetrics(), LogsMetrics()
    for each in (eager, module):
        each.net = Body(*each.net)
    module.net.compile(backend=backend)
    found = [validate([evaluator()], each, inference_mode=False) for each in (module, eager)]
    assert_identical(*found)
    assert ran == ["clean", "second"] * 3


def test_compiled_embeddings_are_refused() -> None:
    module = Tokens()
    module.head.compile(backend="eager")
    with pytest.raises(
        ValueError, match=r"AdversarialEvaluation perturbs the output of an nn\.Embedding.*Train uncompiled"
    ):
        validate([evaluator()], module, sentences())


# Ranks.


class Halves(LogsMetrics):
    """Each rank takes its half of the batch."""

    def build(self) -> None:
        super().build()
        self.net[1] = nn.Identity()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [part.chunk(self.trainer.world_size)[self.global_rank] for part in batch]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.acc.update(logits, batch[1])
        self.collection.update(logits, batch[1])
        self.log("val_acc", self.acc, on_epoch=True)
        self.log_dict(self.collection, on_epoch=True)
        loss = F.cross_entropy(logits, batch[1])
        self.log("val_loss", loss, sync_dist=True)
        return loss


class Write(pl.Callback):
    """Every rank writes what it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(dict(trainer.callback_metrics), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    ranks: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    for arguments in ({}, ranks):
        fit([evaluator(random_start=False), Write(tmp_path)], Halves(), loader(24), **arguments)
    one, first, second = (torch.load(tmp_path / f"{run}.pt") for run in ("1-0", "2-0", "2-1"))
    assert_identical(first, second)
    torch.testing.assert_close(first, one)
    clean, attacked = parted(one)
    assert attacked.keys() == clean.keys()
    assert attacked["val_acc"] < clean["val_acc"]


# Other callbacks.


class Attentive(Net):
    """Has attention, whose output projection is never called, and a module that gets at its weight in a way of its own."""

    def build(self) -> None:
        self.net = AttentiveClassifier().body.append(nn.Linear(16, CLASSES))
        self.sparse = Tape()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        now = "quiet" if is_quiet(self) else "second" if self in adversarial_evaluation._SECOND else "clean"
        if not self.trainer.sanity_checking:  # which comes before the first mask
            self.sparse((now, *(float((weight == 0).float().mean()) for weight in self.viewed())))
        return super().validation_step(batch, batch_idx)

    def viewed(self) -> list[Tensor]:
        return [self.net[3]._parameters["w"], self.net[5].self_attn.out_proj.weight]


@pytest.mark.parametrize("is_first", [True, False])
def test_both_validations_see_sparse_weights(is_first: bool) -> None:
    def dense(trainer: Any, module: Any) -> None:
        after.append(
            [
                float((p == 0).float().mean())
                for p in (module.net[3].w, module.net[5].self_attn._parameters["in_proj_weight"])
            ]
        )

    after: list[Any] = []
    modules = [Attentive(), Attentive()]
    runs = []
    for module, more in zip(modules, ([], [evaluator()]), strict=True):
        sparse = NMSparsity("1:4", "sr-ste", include=["*attn*", "*3.w"])
        callbacks = [*more, sparse] if is_first else [sparse, *more]
        runs.append(fit([*callbacks, At(on_validation_end=dense)], module, loader(16)))
    assert_identical(state_of(runs[0], modules[0]), state_of(runs[1], modules[1]))
    assert set(modules[1].sparse.seen) == {(now, 0.75, 0.75) for now in ("clean", "quiet", "second")}
    assert all(share < 0.1 for shares in after for share in shares)
    clean, attacked = parted(dict(runs[1].callback_metrics))
    replayed = Attentive()
    replayed.load_state_dict(modules[1].state_dict())
    expected = validate([], replayed, attack(replayed, [loader(16)]))
    torch.testing.assert_close(attacked, expected)
    assert attacked["val_loss"] > clean["val_loss"]


@pytest.mark.parametrize("is_first", [True, False])
def test_averaged_weights_come_with_their_buffers(is_first: bool) -> None:
    def note(trainer: Any, module: Any, *_: Any) -> None:
        averaged.update({name: value.clone() for name, value in module.net.state_dict().items()})

    averaged: dict[str, Tensor] = {}
    both = [evaluator(), EMAWeightAveraging(decay=0.8)]
    trainer = fit([*(both if is_first else both[::-1]), At(on_validation_batch_end=note)], Net())
    replayed = Net()
    replayed.net.load_state_dict(averaged)
    expected = validate([], replayed, attack(replayed, [loader()]))
    clean, attacked = parted(dict(trainer.callback_metrics))
    assert_identical(attacked, expected)
    assert {name: clean[name] for name in expected} != expected


def test_monitors_see_it(tmp_path: Path) -> None:
    stop = EarlyStopping("adversarial/val_acc", patience=1, mode="max", min_delta=2.0)
    best = ModelCheckpoint(
        tmp_path, "{adversarial/val_acc:.6f}", monitor="adversarial/val_acc", mode="max", auto_insert_metric_name=False
    )
    rate = AccuracyGradientLR("adversarial/val_acc", window=1, cooldown=1, threshold=2.0, figure=False)
    trainer = fit([rate, evaluator(), stop, best], Net(), max_epochs=9)
    assert trainer.current_epoch == 2, "stopped"
    assert rate.state_dict()["values"][-1] == pytest.approx(trainer.callback_metrics["adversarial/val_acc"].item())
    assert best.best_model_score is not None
    assert best.best_model_score >= trainer.callback_metrics["adversarial/val_acc"]


def test_adversarial_training_beside_it() -> None:
    class Shares(LogsMetrics):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            super().validation_step(batch, batch_idx)
            return self.training_step(batch, batch_idx)

    left: list[Any] = []
    keys: Any = None
    for more in ([], [evaluator()]):
        module = Shares()
        trainer = fit([AdversarialTraining(0.2, check_every_n_epochs=1), *more], module)
        metrics = dict(trainer.callback_metrics)
        keys = keys or metrics.keys()
        left.append([state_of(trainer, module), {key: metrics[key] for key in keys}])
    assert_identical(*left)
    assert any(key.startswith("adversarial/") for key in keys)
    assert metrics["adversarial/val_acc"] < metrics["val_acc"]


def test_the_other_namespace() -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Plain(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net
            self.outputs: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self.net(batch[0])
            self.outputs.append(logits)
            self.log("val_loss", F.cross_entropy(logits, batch[1]))
            self.log("val_acc", share_of_right(logits, batch[1]))

        def on_validation_epoch_end(self) -> None:
            self.log("rows", float(len(torch.cat(self.outputs))))

    found = []
    for callbacks in ([evaluator()], []):
        trainer = other.Trainer(
            accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        trainer.validate(Plain(), loader(), verbose=False)
        found.append(dict(trainer.callback_metrics))
    clean, attacked = parted(found[0])
    assert_identical(clean, found[1])
    expected = validate([], Net(), attack(Net(), [loader()]))
    assert_identical(attacked, {**{key: expected[key] for key in ("val_loss", "val_acc")}, "rows": torch.tensor(21.0)})
