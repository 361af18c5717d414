"""Embeddings, optimizers that evaluate their closure again, several ranks, and other callbacks beside the attack."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grad.callbacks import DataPruning, GradientMonitor, InfoBatch, LossReweighting, NMSparsity, NormClipping
from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.quiet import is_quiet
from lightning_grad.functional.adversarial.attacks import fgsm
from lightning_grad.testing import assert_identical
from tests.callbacks.adversarial.attacked import (
    BATCHES,
    At,
    Classifier,
    Linear,
    Tape,
    as_batches,
    attacked_and_replayed,
    attacker,
    points,
    train,
)
from tests.callbacks.data_pruning import test_data_pruning as pruned

SIGN = torch.tensor([1.0, -1.0])  # of Linear's weight

# Embeddings.


class Tokens(Linear):
    """Mean of words, each beside its place; what follows the embeddings is linear."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr=lr)
        torch.manual_seed(0)
        self.words, self.unused, self.places = nn.Embedding(5, 2), nn.Embedding(5, 2), nn.Embedding(3, 2)
        self.seen_places: list[Tensor] = []

    def input_of(self, batch: Any) -> Tensor:
        found = self.words(self.tokens_of(batch))
        self.seen_places.append(self.places(torch.arange(3)).detach().clone())
        return found

    def tokens_of(self, batch: Any) -> Tensor:
        return batch["tokens"] if isinstance(batch, dict) else batch[0]


def sentences() -> list[Any]:
    tokens = torch.randint(5, (2, 4, 3), generator=torch.Generator().manual_seed(2))
    return [[row, row.roll(1)] for row in tokens]


@pytest.mark.parametrize(
    ("batches", "key"),
    [
        (sentences(), None),
        (sentences(), "embedding"),
        ([{"features": torch.zeros(4, 3), "tokens": tokens} for tokens, _ in sentences()], "embedding"),
    ],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_first_embedding_that_is_called_is_attacked(batches: Any, key: Any, norm: Any) -> None:
    gradients: list[Tensor] = []
    keep = At(on_after_backward=lambda trainer, module: gradients.append(module.words.weight.grad.clone()))
    module = Tokens()
    train([attacker(input_key=key, norm=norm), keep], module, as_batches(batches))
    # In l2 a sample is a sentence of three words.
    move = 0.25 * SIGN if norm == "linf" else 0.25 * torch.tensor([0.6, -0.8]) / 3**0.5
    for seen, gradient, (tokens, _) in zip(module.inputs, gradients, sentences(), strict=True):
        torch.testing.assert_close(seen, module.words.weight[tokens] + move)
        counts = F.one_hot(tokens.flatten(), 5).sum(0).unsqueeze(1)
        torch.testing.assert_close(gradient, counts * module.weight.detach() / 12)
    assert all(torch.equal(places, module.places.weight) for places in module.seen_places)
    assert not module.words._forward_hooks


def test_weights_behind_an_embedding_have_gradients_under_autocast() -> None:
    found: list[Tensor] = []
    keep = At(on_after_backward=lambda trainer, module: found.append(module.weight.grad.clone()))
    module = Tokens()
    train(
        [attacker(check_every_n_epochs=1), keep], module, as_batches(sentences()), precision="bf16-mixed", max_epochs=2
    )
    for gradient, seen in zip(found, module.inputs, strict=True):
        torch.testing.assert_close(gradient, seen.mean((0, 1)), rtol=0.02, atol=0.02)
        assert gradient.abs().min() > 0.05


def test_an_entry_that_is_called_embedding_goes_before_the_layer() -> None:
    class Named(Tokens):
        def input_of(self, batch: Any) -> Tensor:
            return batch["embedding"]

    module = Named()
    train(attacker(input_key="embedding"), module, as_batches([{"embedding": torch.zeros(4, 2)}]))
    torch.testing.assert_close(module.inputs[0], (0.25 * SIGN).expand(4, 2))


def test_embeddings_that_are_compiled_or_not_called() -> None:
    class Uncalled(Tokens):
        def input_of(self, batch: Any) -> Tensor:
            return self.places.weight.sum() + F.one_hot(batch[0], 2)

    class Small(Tokens):
        def tokens_of(self, batch: Any) -> Tensor:
            return batch[0] % 5

    module = Small()
    module.words.compile(backend="eager")
    with pytest.raises(
        ValueError, match=r"AdversarialTraining perturbs the output of an nn\.Embedding.*Train uncompiled"
    ):
        train(attacker(), module, as_batches(sentences()))
    with pytest.raises(
        RuntimeError,
        match=r"AdversarialTraining perturbs .* nn\.Embedding, but the step calls none\. Call",
    ):
        train(attacker(), Uncalled(), as_batches([[torch.ones(4, 3, dtype=torch.long)]]))


# Closures that are evaluated again.


class Twice(torch.optim.SGD):
    """Evaluates its closure at the weights and beside them, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        weights = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p in weights:
                p.sub_(5.0 * p.grad)
        closure()
        with torch.no_grad():
            for p, old in zip(weights, before, strict=True):
                p.copy_(old)
        super().step()
        return loss


class Evaluated(pl.LightningModule):
    """Remembers what its steps see, of the attack and of others."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.make, self.real, self.attacks = make, Tape(), Tape()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (self.attacks if is_quiet(self) else self.real)((batch_idx, batch[0].detach().clone()))
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


OPTIMIZERS = {
    "twice": (lambda parameters: Twice(parameters, lr=0.1), 2),
    "lbfgs": (lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3), 3),
}


@pytest.mark.parametrize("new_containers", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closures_see_the_same_attack_whenever_they_are_evaluated(name: str, new_containers: bool) -> None:
    make, times = OPTIMIZERS[name]
    module = Evaluated(make)
    if new_containers:  # as DDP does on a GPU
        wrap_method(
            module, "training_step", lambda inner, batch, *rest: inner(list(batch), *rest), order=WrapOrder.LOOK
        )
    train(attacker(), module, points(3))
    assert len(module.attacks.seen) == 3
    for i in range(3):
        inputs = [x for batch_idx, x in module.real.seen if batch_idx == i]
        assert len(inputs) >= times
        assert all(torch.equal(x, inputs[0]) for x in inputs)
        assert (inputs[0] - list(points(3))[i][0]).abs().max() == pytest.approx(0.25)


# Ranks.


class Halves(pl.LightningModule):
    """Each rank takes its half of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].chunk(self.trainer.world_size)[self.global_rank]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        return F.cross_entropy(self.net(x), (x[:, 0] > 0.5).long().detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Write(pl.Callback):
    """Every rank writes its weights and the accuracies that it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        told = {key: value for key, value in trainer.callback_metrics.items() if "accuracy" in key}
        path = self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt"
        torch.save({"weights": dict(pl_module.state_dict()), "told": told}, path)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_two_ranks_are_one_process(attack: Any, tmp_path: Path) -> None:
    ranks: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    for arguments in ({}, ranks):
        callbacks = [attacker(0.1, attack=attack, check_every_n_epochs=1), Write(tmp_path)]
        train(callbacks, Halves(), points(4, 8), max_epochs=2, **arguments)
    one, first, second = (torch.load(tmp_path / f"{run}.pt") for run in ("1-0", "2-0", "2-1"))
    assert_identical(first, second)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-6, atol=1e-6)
    assert len(one["told"]) == 2
    torch.testing.assert_close(first["told"], one["told"])
    plain = Halves()
    train([], plain, points(4, 8), max_epochs=2)
    assert (plain.net[0].weight - one["weights"]["net.0.weight"]).abs().max() > 1e-3, "the attack did something"


def test_ranks_begin_at_points_of_their_own(tmp_path: Path) -> None:
    class Same(Linear):
        def on_train_end(self) -> None:
            torch.save(self.inputs, tmp_path / f"{self.global_rank}.pt")

    ranks: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    train(attacker(random_start=True, step_size=0.01), Same(), points(), **ranks)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all((one - other).abs().max() > 0.05 for one, other in zip(first, second, strict=True))


# Other callbacks: what they do is what they do on batches that were attacked beforehand.


class Own(nn.Module):
    """Gets at its weight in a way of its own, so that a sparse one must be written into the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._parameters["w"].T


class Attentive(Classifier):
    """Has attention, whose output projection is never called."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        torch.manual_seed(4)
        self.body = nn.Sequential(*self.body, Own(), nn.Unflatten(1, (2, 8)), nn.TransformerEncoderLayer(8, 2, 16, 0.1))
        self.body.append(nn.Flatten())


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Classifier]]] = {
    "sparse attention": (lambda: NMSparsity("2:4", "sr-ste", include=["*attn*", "*3.w"]), Attentive),
    "reweighted": (lambda: LossReweighting(warmup_fraction=0.0), lambda: Classifier(norm=True)),
    "monitor": (lambda: GradientMonitor(), Classifier),
    "clipped": (lambda: NormClipping(0.3), Classifier),
}


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_others_do_what_they_do_on_attacked_batches(name: str, is_first: bool, tmp_path: Path) -> None:
    make, module = OTHERS[name]
    found, _ = attacked_and_replayed(lambda: [make()], module, tmp_path, attack="pgd", steps=2, others_first=is_first)
    assert_identical(found[0], found[1])
    plain = module()
    train([attacker(attack="pgd", steps=2)], plain, max_epochs=2)
    weights = [state["state"]["module"] for state in found]
    differ = any(not torch.equal(weights[0][key], value) for key, value in plain.state_dict().items())
    assert differ == (name != "monitor"), "the other one did something"


def test_attacks_see_the_sparse_weight() -> None:
    class Sees(Attentive):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            shown((self.body[3]._parameters["w"] == 0).float().mean())
            return super().training_step(batch, batch_idx)

    shown, module = Tape(), Sees()
    train([attacker(), NMSparsity("1:4", "ste", include=["*3.w"])], module)
    assert shown.seen == [0.75] * 2 * BATCHES
    assert len(module.batches) == BATCHES


class Still(pruned.Classifier):
    """Does not learn, so that its losses are known."""

    def __init__(self) -> None:
        super().__init__(normalizes=False)
        self.learning_rate = 0.0


def test_scores_are_those_of_clean_samples() -> None:
    found = []
    for more in ([], [attacker(3.0, random_start=True)]):
        callback = DataPruning(0.5, "el2n", epoch=1, num_shown=0, figure=False)
        run = pruned.train(callback, Still(), more=more)
        found.append([callback.scored.values, run.watch.epochs])
    assert_identical(found[0], found[1])


@pytest.mark.parametrize("is_first", [True, False])
def test_recorded_losses_are_those_of_the_real_step(is_first: bool) -> None:
    recorded: list[Any] = []

    def note(trainer: Any, pl_module: Any) -> None:
        recorded.append(info._values.clone())

    info, attack, module = InfoBatch(0.5, prune_until=1.0), attacker(0.3), Still()
    callbacks = [attack, info] if is_first else [info, attack]
    pruned.train(At(on_train_epoch_end=note), module, epochs=1, more=callbacks)
    x, y, _ = pruned.make_data().tensors
    twin = copy.deepcopy(module).eval()
    moved = fgsm(lambda x: F.cross_entropy(twin(x), y), x, 0.3, random_start=False)
    with torch.no_grad():
        expected, clean = (F.cross_entropy(twin(points), y, reduction="none") for points in (moved, x))
    torch.testing.assert_close(recorded[0].float(), expected)
    assert (expected - clean).mean() > 0.1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
def test_a_network_that_is_compiled_is_attacked_as_it_is() -> None:
    torch._dynamo.reset()
    ran: list[bool] = []
    built: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        built.append(1)

        def compiled(*args: Any) -> Any:
            ran.append(is_quiet(module))
            return graph.forward(*args)

        return compiled

    eager, module = Classifier(dropout=0.0, norm=False), Classifier(dropout=0.0, norm=False)
    for each in (eager, module):
        torch.manual_seed(5)
        each.body.append(Own())
    module.body[3].compile(backend=backend)
    for each in (eager, module):
        train(attacker(attack="pgd", steps=2), each)
    assert ran == [True, True, False] * BATCHES
    assert len(built) == 1, "nothing is compiled anew for the attack"
    assert_identical([x for x, _ in eager.batches], [x for x, _ in module.batches])
    assert_identical(dict(eager.state_dict()), dict(module.state_dict()))
