"""HessianSpectrum measures the module's own loss, also through attention, and refuses what has no second derivative."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import HessianSpectrum
from lightning_grad.functional import HessianProduct
from lightning_grad.testing import make_trainer, on_ranks

CLASSES = 3


class Classifies(pl.LightningModule):
    """A network whose dropout and batch norm would make its curvature depend on the mode."""

    optimizer: Any = staticmethod(lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Attends(Classifies):
    """Attention by the kernel that torch chooses, or by a kernel of its own choice."""

    kernel: SDPBackend | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        q = self.net[0](batch[0]).view(-1, 1, 1, 5)
        if self.kernel is None:
            mixed = F.scaled_dot_product_attention(q, q, q)
        else:
            with sdpa_kernel(self.kernel):
                mixed = F.scaled_dot_product_attention(q, q, q)
        return F.cross_entropy(self.net[4](mixed.flatten(1)), batch[1])


class Recomputes(Attends):
    """Attention whose forward pass is repeated in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return checkpoint(super().training_step, batch, batch_idx, use_reentrant=False)


class Regresses(Classifies):
    """Every eigenvalue of its Hessian occurs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self.net(batch[0]), batch[0][:, :CLASSES])


class ByHand(Classifies):
    """A loss that cannot be separated into samples, in the middle of a dictionary."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"size": 1, "loss": F.cross_entropy(self.net(batch[0]), batch[1]).sqrt()}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(20, 6, generator=generator), torch.arange(20) % CLASSES)


def run(probe: HessianSpectrum, kind: type = Classifies, **arguments: Any) -> Any:
    pl.seed_everything(1, verbose=False)
    module = kind()
    trainer = make_trainer(callbacks=[probe], **{"max_epochs": 1, **arguments})
    trainer.fit(module, DataLoader(data(), 4))
    return module.eval()


def dense_of(module: Any, indices: list[int], parts: int = 4) -> Tensor:
    """Return the Hessian of the mean loss of some samples, in batches as the loader makes them."""
    x, y = data()[indices]
    pairs = list(zip(x.split(parts), y.split(parts), strict=True))
    losses = [module.training_step(pair, 0) for pair in pairs]
    losses = [loss["loss"] if isinstance(loss, dict) else loss for loss in losses]
    loss = sum(loss * len(pair[1]) / len(indices) for loss, pair in zip(losses, pairs, strict=True))
    product = HessianProduct(loss, list(module.parameters()))
    return torch.stack([product(row) for row in torch.eye(product.size)]).double()


@pytest.mark.parametrize("kind", [Classifies, ByHand, Attends, Recomputes, Regresses])
def test_curvature_is_that_of_the_dense_hessian(kind: Any) -> None:
    probe = HessianSpectrum(samples=[3, 7, 8, 11, 19, 1], probes=40)
    module = run(probe, kind)
    with sdpa_kernel(SDPBackend.MATH):
        dense = dense_of(module, [3, 7, 8, 11, 19, 1])
    values, found = torch.linalg.eigvalsh(dense), probe.record.last
    largest = [found[f"eigenvalue_{number}"] for number in (1, 2, 3)]
    assert largest == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-3)
    assert found["eigenvalue_min"] == pytest.approx(float(values[0]), rel=0.05, abs=1e-3)
    assert abs(found["trace"] - float(dense.trace())) < 3.5 * found["trace_error"]
    assert found["stability_edge"] == pytest.approx(20)
    assert set(found) == {
        *("epoch", "step", "eigenvalue_1", "eigenvalue_2", "eigenvalue_3", "eigenvalue_min", "eigenvalue_error"),
        *("trace", "trace_error", "stability_edge"),
    }
    module.train()
    with sdpa_kernel(SDPBackend.MATH):
        other = torch.linalg.eigvalsh(dense_of(module, [3, 7, 8, 11, 19, 1]))
    if kind is Classifies:
        assert not torch.allclose(other[-2:], values[-2:], rtol=0.01), "the training mode has another curvature"


def test_fused_attention_has_no_second_derivative_by_itself() -> None:
    q = torch.randn(2, 1, 3, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loss = F.scaled_dot_product_attention(q, q, q).square().sum()
        with pytest.raises(RuntimeError, match="is not implemented"):
            HessianProduct(loss, [q])(torch.ones(q.numel()))


def test_a_module_that_chooses_the_fused_kernel_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attends, "kernel", SDPBackend.FLASH_ATTENTION)
    with pytest.raises(RuntimeError, match=r"HessianSpectrum needs second derivatives.*flash.*SDPBackend\.MATH"):
        run(HessianSpectrum(samples=4), Attends)


def test_only_sgd_has_an_edge_and_fewer_probes_log_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Classifies, "optimizer", staticmethod(torch.optim.AdamW))
    probe = HessianSpectrum(samples=4, probes=0, density=False, num_eigenvalues=1)
    run(probe, logger=CSVLogger(tmp_path, name="", version=""))
    assert set(probe.record.last) == {"epoch", "step", "eigenvalue_1", "eigenvalue_min", "eigenvalue_error"}
    assert {path.name for path in tmp_path.iterdir()} >= {"hessian_spectrum.csv", "hessian_spectrum.png"}
    assert not (tmp_path / "hessian_spectrum").exists()


def test_files_and_what_is_kept(tmp_path: Path) -> None:
    probe = HessianSpectrum(samples=4)
    run(probe, logger=CSVLogger(tmp_path, name="", version=""), max_epochs=2)
    assert {path.name for path in (tmp_path / "hessian_spectrum").iterdir()} == {
        f"step_{step:08d}_density.png" for step in (4, 9)
    }
    first, second = probe.kept_looks.kept
    width = (first["at"][1:] - first["at"][:-1]).mean()
    assert float(first["density"].sum() * width) == pytest.approx(1, abs=1e-2)
    assert not torch.equal(first["density"], second["density"])
    assert int(first["size"]) == sum(p.numel() for p in Classifies().parameters())


class Gathers(Classifies):
    """A loss over the samples of all ranks, so each pass of any rank needs the others."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Lightning uses a function that newer torch deprecates
            logits: Any = self.all_gather(self.net(batch[0]), sync_grads=True)
            labels: Any = self.all_gather(batch[1])
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def on_both(kinds: list[type]) -> list[dict[str, Any]]:
    probes = [HessianSpectrum(samples=8) for _ in kinds]
    for probe, kind in zip(probes, kinds, strict=True):
        run(probe, kind, strategy="ddp", devices=2)
    return [probe.record.last for probe in probes]


def test_a_step_that_gathers_samples_from_all_ranks() -> None:
    one, other = on_ranks(2, on_both, [Classifies, Gathers], limit=60.0)
    assert one == other
    plain, gathered = one
    assert gathered == pytest.approx(plain, rel=1e-3), "all ranks read the same samples"
    assert gathered["eigenvalue_1"] > 0


def test_the_legend_of_the_looks_is_read_row_by_row() -> None:
    probe = HessianSpectrum(samples=4)
    for step in range(7):
        probe.record.add({"epoch": step, "step": step, "eigenvalue_1": 1.0, "eigenvalue_min": -3.0 - step})
        density = {"at": torch.linspace(0, 1, 9), "density": torch.ones(9), "size": torch.tensor(5)}
        probe.kept_looks.add({"epoch": step, "step": step, **density})
    curves, densities = probe.draw(probe.record).axes
    columns = [text.get_text() for text in densities.get_legend().get_texts()]
    assert columns == [f"step {step}" for step in (0, 5, 1, 6, 2, 3, 4)]
    assert curves.get_ylim()[0] < -9


class Broken(Classifies):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if not self.training else 1.0)


class NoLoss(Classifies):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.training else None


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (Broken, {}, "found no curvature, because the loss is nan"),
        (NoLoss, {}, "HessianSpectrum differentiates it. Return the loss from training_step"),
        (Classifies, {"samples": 21}, "would inspect 21 samples, but the training set has 20"),
    ],
)
def test_refusals(kind: type, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(HessianSpectrum(**{"samples": 4, **arguments}), kind)
