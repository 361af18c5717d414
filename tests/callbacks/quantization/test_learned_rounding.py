"""LearnedRounding beyond the contract: when it rounds, which files hold the result, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_grad.callbacks import LearnedRounding, Lookahead, NMSparsity, QuantizationAwareTraining
from lightning_grad.functional import mse_scales, quantize_weight, read_quantized_weight
from lightning_grad.utilities import round_weights, sparsity_report
from tests.callbacks.sparsity.test_nm_sparsity import Regression, data, linear_net, trainer

WEIGHTS = ("net.0.weight", "net.2.weight")


def rounding(**arguments: Any) -> LearnedRounding:
    return LearnedRounding(**{"bits": 2, "steps": 40, "include": ["*"], **arguments})


def fit(*callbacks: Any, module: Any = None, ckpt_path: Any = None, **arguments: Any) -> Any:
    module = Regression(linear_net()) if module is None else module
    trainer(*callbacks, **arguments).fit(module, data(), data(), ckpt_path=ckpt_path)
    return module


def on_grid(state: dict[str, Tensor], bits: int = 2) -> bool:
    for name in WEIGHTS:
        try:
            read_quantized_weight(state[name], bits)
        except ValueError:
            return False
    return True


@pytest.fixture(scope="module")
def dense() -> Any:
    return fit().state_dict()


def test_it_rounds_what_training_without_it_gives_and_better_than_nearest(dense: Any) -> None:
    callback = rounding()
    module = fit(callback)
    assert on_grid(module.state_dict())
    assert callback.report.keys() == set(WEIGHTS)
    for name, quantized in callback.report.items():
        assert quantized.bits == 2
        assert torch.equal(quantized.dequantize(), module.state_dict()[name])
    others = dense.keys() - set(WEIGHTS)
    assert all(torch.equal(module.state_dict()[name], dense[name]) for name in others)
    nearest, plain = Regression(linear_net()), Regression(linear_net())
    plain.load_state_dict(dense)
    weights = {
        name: quantize_weight(dense[name], 2, scales=mse_scales(dense[name], 2)).dequantize() for name in WEIGHTS
    }
    nearest.load_state_dict({**dense, **weights})
    x = data().dataset.tensors[0]
    errors = [F.mse_loss(each.net(x), plain.net(x)) for each in (module, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_it_equals_the_function_on_the_same_batches(dense: Any) -> None:
    plain = Regression(linear_net())
    plain.load_state_dict(dense)
    round_weights(plain, data(), 2, include=["*"], steps=40, run=lambda m, b: m.net(b[0]), verbose=False)
    module = fit(rounding())
    for name in WEIGHTS:
        torch.testing.assert_close(module.state_dict()[name], plain.state_dict()[name])


class Validated(pl.Callback):
    """Keeps the weights that each validation computes with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if args[2] == 0 and not trainer.sanity_checking:
            self.weights.append(
                {name: copy.deepcopy(pl_module.get_submodule(name[:-7]).weight.detach()) for name in WEIGHTS}
            )


def test_the_last_validation_and_the_files_after_it_hold_the_rounded_weights(tmp_path: Path) -> None:
    seen, last = Validated(), ModelCheckpoint(tmp_path, save_last=True)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="max")  # the first epoch would be the best
    steps = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=10, save_top_k=-1)
    logger = CSVLogger(tmp_path / "logs")
    module = fit(rounding(), seen, last, best, steps, max_epochs=2, enable_checkpointing=True, logger=logger)
    assert [on_grid(weights) for weights in seen.weights] == [False, True]
    files = [
        last.best_model_path,
        last.last_model_path,
        best.best_model_path,
        *sorted((tmp_path / "steps").iterdir())[-1:],
    ]
    for file in files:
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items()), file
        assert all(torch.equal(state[name], value) for name, value in seen.weights[-1].items())
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "quant/rounding_error" in metrics
    assert "quant/undecided" in metrics


def test_a_run_that_stops_early_is_rounded_and_the_files_from_before_are_named(tmp_path: Path) -> None:
    stop, last = EarlyStopping("val_loss", patience=1, min_delta=1e9), ModelCheckpoint(tmp_path, save_last=True)
    with pytest.warns(UserWarning, match=r"last\.ckpt.*weights from before.*save_checkpoint"):
        module = fit(rounding(), stop, last, max_epochs=9, enable_checkpointing=True)
    assert on_grid(module.state_dict())
    assert not on_grid(torch.load(last.last_model_path, weights_only=True)["state_dict"])


def test_a_best_file_from_before_rounding_is_named(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = {"max_epochs": 3, "check_val_every_n_epoch": 2, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match=r"epoch=1-step=40.ckpt was saved before it rounded.*save_checkpoint"):
        fit(rounding(steps=0), best, **run)
    assert not on_grid(torch.load(best.best_model_path, weights_only=True)["state_dict"])


def test_a_longer_run_continues_from_the_weights_before_rounding(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path, save_last=True)
    shorter = fit(rounding(), first, max_epochs=1, enable_checkpointing=True)
    last = ModelCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match=r"last.ckpt was saved before it rounded"):
        continued = fit(rounding(), last, enable_checkpointing=True, ckpt_path=first.last_model_path, max_epochs=2)
    whole = fit(rounding(), max_epochs=2)
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value)
    assert not torch.equal(shorter.net[0].weight, whole.net[0].weight)
    again = rounding()
    assert not again.report
    over = fit(again, last, enable_checkpointing=True, ckpt_path=first.last_model_path, max_epochs=1)
    assert all(torch.equal(over.state_dict()[name], value) for name, value in shorter.state_dict().items())
    assert again.report.keys() == set(WEIGHTS)
    with pytest.warns(UserWarning, match=r"rounded nothing, because the run had no batch left.*round_weights"):
        fit(rounding(bits=3), last, enable_checkpointing=True, ckpt_path=first.last_model_path, max_epochs=1)


def test_sparse_weights_stay_sparse(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, save_last=True)
    module = fit(rounding(bits=3), NMSparsity("2:4", include=["*"]), last, enable_checkpointing=True)
    state = torch.load(last.last_model_path, weights_only=True)["state_dict"]
    plain = Regression(linear_net())
    plain.load_state_dict(state)
    for each in (module, plain):
        assert all(row.exact for row in sparsity_report(each, "2:4", verbose=False))
        assert on_grid(each.state_dict(), 3)


class Tied(nn.Module):
    """A parameter used by its name, a tied one, and noise in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.mix = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x + 0.01 * torch.randn_like(x))))
        return x @ self.mix.T


def test_tied_weights_and_parameters_used_by_name() -> None:
    callback = rounding(include=["net.first.weight", "net.mix"], bits=3)
    module = fit(callback, module=Regression(Tied()))
    assert module.net.first.weight is module.net.second.weight
    assert callback.report.keys() == {"net.first.weight", "net.mix"}
    for name in callback.report:
        read_quantized_weight(module.get_parameter(name), 3)
    assert not {"weight", "mix"} & (module.net.__dict__.keys() | module.net.first.__dict__.keys())


def test_outliers_keep_their_values(dense: Any) -> None:
    callback = rounding(outliers=0.05, outlier_score="gradient")
    module = fit(callback)
    for name in WEIGHTS:
        value, before = module.state_dict()[name], dense[name]
        assert torch.equal(callback.report[name].dequantize(), value)
        assert (value == before).sum() == int(0.05 * before.numel())


def test_outliers_of_a_frozen_layer() -> None:
    module = Regression(linear_net())
    frozen = module.net[0].weight.requires_grad_(False).clone()
    fit(rounding(outliers=0.05), module=module)
    assert (module.net[0].weight == frozen).sum() == int(0.05 * frozen.numel())
    assert not module.net[0].weight.requires_grad


def test_blocks_are_rounded_together(capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    module = Regression(nn.Sequential(linear_net(), nn.Linear(8, 8)))
    with caplog.at_level("INFO"):
        fit(rounding(blocks=["net.0"]), module=module)
    table = [record.message for record in caplog.records if "undecided" in record.message][-1]
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["net.0", "net.1"]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data().dataset)


def test_what_it_refuses_before_training() -> None:
    streamed = DataLoader(Stream(), batch_size=8)
    with pytest.raises(TypeError, match="reads samples by their index"):
        trainer(rounding(), max_steps=1).fit(Regression(linear_net()), streamed)
    with pytest.raises(ValueError, match=r"replaces them afterwards.*round_weights"):
        fit(rounding(), EMAWeightAveraging())
    for averaging in (Lookahead(), StochasticWeightAveraging(0.01)):
        words = f"{type(averaging).__name__} replaces them by averages afterwards.*round_weights"
        for callbacks in ([rounding(), averaging], [averaging, rounding()]):
            with pytest.raises(ValueError, match=words):
                fit(*callbacks)
    with pytest.raises(ValueError, match="both choose"):
        fit(rounding(), QuantizationAwareTraining(include=["*"]))
    with pytest.raises(ValueError, match=r"'net\.2' contains no weight"):
        fit(rounding(blocks=["net.2"], include=["net.0"]))
    with pytest.raises(ValueError, match="no parameter or module is named 'nets'"):
        fit(rounding(blocks=["nets"]))


def test_an_error_while_rounding_says_who_raised_it() -> None:
    class Unstable(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.training:
                raise OverflowError("the step fails in eval mode")
            return super().training_step(batch, batch_idx)

    with pytest.raises(OverflowError) as found:
        fit(rounding(), module=Unstable(linear_net()))
    assert "LearnedRounding raised this when it rounded" in found.value.__notes__[0]
