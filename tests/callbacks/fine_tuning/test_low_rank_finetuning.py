"""LowRankFinetuning: ranks of the whole module, products that train in place of weights, and what stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import LowRankFinetuning, NMSparsity
from lightning_grad.callbacks.fine_tuning._factored_weight import FactoredWeight
from lightning_grad.core import FoundWeight
from lightning_grad.functional import global_ranks, low_rank_factors
from lightning_grad.testing import make_trainer, on_ranks

CLASSES, BATCH = 5, 16


class InOut(nn.Module):
    """A layer of another package that computes x W."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(pl.LightningModule):
    """Layers of every kind; the spectra of some are steep, as after a pretraining."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 16, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.linear = nn.Linear(256, 32)
        self.mixed = InOut(32, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, CLASSES)
        with torch.no_grad():
            for weight in (self.linear.weight, self.mixed.weight):
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_((u * s * torch.linspace(1, 0.02, len(s)) ** 4) @ v * 4)
        self.validated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.linear(F.relu(self.norm(self.conv(x))).flatten(1)))
        tokens = self.mixed(hidden)[:, None]
        return self.head(self.attention(tokens, tokens, tokens)[0][:, 0])  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_validation_start(self) -> None:
        self.validated = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self(batch[0]).detach().clone())
        self.log("val_loss", F.cross_entropy(self.validated[-1], batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.003)


def data(batches: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * BATCH, 1, 8, 8, generator=generator)
    y = torch.randint(CLASSES, (batches * BATCH,), generator=generator)
    return DataLoader(TensorDataset(x, y), BATCH)


def fit(*callbacks: Any, module: Any = None, ckpt: Any = None, **arguments: Any) -> Any:
    module = Net() if module is None else module
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **arguments})
    trainer.fit(module, data(), data(2), ckpt_path=ckpt)
    return trainer, module


def changed(module: nn.Module) -> set[str]:
    was = dict(Net().named_parameters())
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, was[name])}


MATRICES = {
    "conv.weight": lambda w: w.flatten(1),
    "linear.weight": lambda w: w,
    "mixed.weight": lambda w: w.t(),
    "attention.in_proj_weight": lambda w: w,
    "attention.out_proj.weight": lambda w: w,
    "head.weight": lambda w: w,
}


def expected_ranks(reduction: float) -> dict[str, int]:
    """Return the ranks from the function on the matrices of the module."""
    start = dict(Net().named_parameters())
    values = [torch.linalg.svdvals(of(start[name].detach())) for name, of in MATRICES.items()]
    return dict(zip(MATRICES, global_ranks(values, reduction), strict=True))


def low(callback: LowRankFinetuning) -> set[str]:
    """Return the weights that lose half of their rank."""
    start = dict(Net().named_parameters())
    full = {name: min(MATRICES[name](start[name]).shape) for name in callback._ranks}
    return {name for name, rank in callback._ranks.items() if rank < 0.5001 * full[name]}


class Start(pl.Callback):
    """Keeps what the module computes at the start of the training, and what trains."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.outputs = copy.deepcopy(pl_module)(data().dataset.tensors[0])  # type: ignore[attr-defined]
        self.trained = {name: p.numel() for name, p in pl_module.named_parameters() if p.requires_grad}
        self.held = sum(p.numel() for p in pl_module.parameters())


@pytest.mark.parametrize("reduction", [0.4, 0.6, 0.8])
def test_ranks_are_those_of_one_threshold_and_what_is_cut_by_half_trains(reduction: float) -> None:
    callback, start = LowRankFinetuning(reduction), Start()
    trainer, module = fit(callback, start)
    ranks = expected_ranks(reduction)
    assert callback._ranks == ranks
    full = {name: min(of(dict(module.named_parameters())[name]).shape) for name, of in MATRICES.items()}
    assert changed(module) == low(callback)
    assert set(start.trained) == {f"{name}_{side}" for name in low(callback) for side in "UV"}
    assert abs(callback.reductions["rank_reduction"] - reduction) <= 0.01
    total = sum(full.values())
    assert callback.reductions["effective_reduction"] == sum(full[n] - ranks[n] for n in low(callback)) / total
    size = sum(p.numel() for p in Net().parameters())
    assert callback.reductions["trained_share"] == sum(start.trained.values()) / size
    for key, value in callback.reductions.items():
        assert float(trainer.callback_metrics[f"fine_tuning/{key}"]) == pytest.approx(value)
    for name in low(callback):
        weight = MATRICES[name](dict(module.named_parameters())[name].detach())
        assert torch.linalg.matrix_rank(weight, rtol=1e-5) <= ranks[name]
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert {name: p.shape for name, p in module.named_parameters()} == {n: p.shape for n, p in Net().named_parameters()}


def test_the_module_computes_with_the_best_approximations_from_the_start() -> None:
    start = Start()
    callback = LowRankFinetuning(0.6)
    fit(callback, start)
    by_hand = Net()
    for name in low(callback):
        weight = dict(by_hand.named_parameters())[name]
        u, v = low_rank_factors(MATRICES[name](weight.detach()), callback._ranks[name])
        product = (v.t() @ u.t()) if name == "mixed.weight" else (u @ v)
        weight.data = product.view(weight.shape)
    torch.testing.assert_close(start.outputs, by_hand(data().dataset.tensors[0]), atol=1e-5, rtol=1e-4)  # type: ignore[attr-defined]


def test_the_memory_of_the_replaced_weights_is_free() -> None:
    callback, start = LowRankFinetuning(0.8), Start()
    fit(callback, start)
    replaced = sum(dict(Net().named_parameters())[name].numel() for name in low(callback))
    size = sum(p.numel() for p in Net().parameters())
    assert start.held == size - replaced + sum(start.trained.values())
    assert start.held < 0.7 * size


@pytest.mark.parametrize("name", MATRICES)
def test_full_rank_gives_the_output_of_the_layer(name: str) -> None:
    module, x = Net(), data().dataset.tensors[0]  # type: ignore[attr-defined]
    before = module(x)
    owner, _, attribute = name.rpartition(".")
    adapter = FactoredWeight(FoundWeight(name, module.get_submodule(owner), attribute, (name,)))
    adapter.attach()
    torch.testing.assert_close(module(x), before, atol=1e-5, rtol=1e-5)
    adapter.enter_inference()
    torch.testing.assert_close(module(x), before, atol=1e-5, rtol=1e-5)
    adapter.detach()
    torch.testing.assert_close(module(x), before, atol=1e-5, rtol=1e-5)
    assert type(module.get_submodule(owner)).__dict__.get("_adapted_class") is None


def test_the_file_has_plain_keys_and_computes_what_was_validated(tmp_path: Any) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True)
    _, module = fit(LowRankFinetuning(0.6), saving, enable_checkpointing=True)
    plain = Net()
    plain.load_state_dict(torch.load(saving.last_model_path)["state_dict"], strict=True)
    plain.eval()
    for batch, validated in zip(data(2), module.validated, strict=True):
        assert torch.equal(plain(batch[0]), validated)
    torch.testing.assert_close(dict(module.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_a_resumed_run_continues_with_the_same_ranks_and_factors(tmp_path: Any) -> None:
    whole, saving = LowRankFinetuning(0.6, cut_frozen=True), ModelCheckpoint(tmp_path, save_last=True)
    _, expected = fit(whole, max_epochs=4)
    first = LowRankFinetuning(0.6, cut_frozen=True)
    fit(first, saving, enable_checkpointing=True, max_epochs=2)
    again, arguments = (
        LowRankFinetuning(0.6, cut_frozen=True),
        {"ckpt": saving.last_model_path, "enable_checkpointing": True},
    )
    _, module = fit(again, saving, max_epochs=4, **arguments)
    assert again._ranks == whole._ranks
    assert again.reductions == whole.reductions
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    with pytest.raises(ValueError, match="rank_reduction"):
        fit(LowRankFinetuning(0.7, cut_frozen=True), saving, **arguments)


def test_frozen_weights_stay_whole_unless_they_are_cut_too() -> None:
    callback = LowRankFinetuning(0.4, cut_frozen=True)
    _, module = fit(callback)
    assert callback.reductions["effective_reduction"] == callback.reductions["rank_reduction"]
    trained, weights = low(callback), dict(module.named_parameters())
    for name in MATRICES.keys() - trained:
        rank = callback._ranks[name]
        u, v = low_rank_factors(MATRICES[name](dict(Net().named_parameters())[name].detach()), rank)
        torch.testing.assert_close(MATRICES[name](weights[name].detach()), u @ v, atol=1e-6, rtol=1e-5)
    assert changed(module) > trained


def test_uniform_ranks_have_the_same_total() -> None:
    adaptive, uniform = LowRankFinetuning(0.6), LowRankFinetuning(0.6, ranks="uniform")
    fit(adaptive)
    fit(uniform)
    assert sum(adaptive._ranks.values()) == sum(uniform._ranks.values())
    assert adaptive._ranks != uniform._ranks
    assert uniform.reductions["effective_reduction"] == pytest.approx(0.6, abs=0.01)


def test_what_trains_besides_the_factors() -> None:
    callback = LowRankFinetuning(0.6, include=["linear", "mixed"], also_train=["head", "norm.bias"])
    _, module = fit(callback)
    assert changed(module) == low(callback) | {"head.weight", "head.bias", "norm.bias"}
    assert callback._ranks.keys() == {"linear.weight", "mixed.weight"}


def test_what_it_refuses_and_skips() -> None:
    with pytest.raises(ValueError, match="is not cut by more than min_cut"):
        fit(LowRankFinetuning(0.3, min_cut=1.0))
    with pytest.raises(ValueError, match="no weight to adapt"):
        fit(LowRankFinetuning(0.5, include=["norm"]))

    class HeadOnly(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="no optimizer holds it"):
        fit(LowRankFinetuning(0.6), module=HeadOnly())
    with pytest.raises(ValueError, match="found no weight to make sparse"):
        fit(NMSparsity("2:4", include=["linear"]), LowRankFinetuning(0.6))
    broken = Net()
    with torch.no_grad():
        broken.head.weight[0, 0] = float("nan")
    callback = LowRankFinetuning(0.6)
    fit(callback, module=broken)
    assert "head.weight" not in callback._ranks


def _train_on_rank() -> tuple[dict[str, int], dict[str, Tensor]]:
    callback = LowRankFinetuning(0.6)
    _, module = fit(callback, strategy="ddp", devices=2, max_epochs=1, use_distributed_sampler=False)
    return callback._ranks, {name: value.clone() for name, value in module.state_dict().items()}


def test_two_ranks_train_what_one_process_does() -> None:
    (first, weights), (second, others) = on_ranks(2, _train_on_rank)
    assert first == second == expected_ranks(0.6)
    _, alone = fit(LowRankFinetuning(0.6), max_epochs=1)
    for name, value in alone.state_dict().items():
        assert torch.equal(weights[name], others[name])
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)


def test_averaged_weights_are_refused() -> None:
    for order in (1, -1):
        callbacks = [LowRankFinetuning(0.6), StochasticWeightAveraging(1e-2, swa_epoch_start=1)][::order]
        with pytest.raises(ValueError, match="StochasticWeightAveraging saves averages of the state dict"):
            fit(*callbacks, max_epochs=2)


@pytest.mark.parametrize("order", [1, -1])
def test_a_view_of_a_replaced_weight_is_refused_by_name(order: int) -> None:
    callbacks = [LowRankFinetuning(0.6), NMSparsity("2:4", include=["linear"])][::order]
    with pytest.raises(ValueError, match=r"linear\.weight: factored by LowRankFinetuning\. Choose other layers"):
        fit(*callbacks)
