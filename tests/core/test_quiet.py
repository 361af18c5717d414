"""Inside ``quiet`` a step does what it likes, and afterwards nothing has happened."""

import copy
import logging
import math
import pickle
import random
import sys
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_grad.callbacks import NMSparsity
from lightning_grad.core.quiet import is_quiet, loggers_muted, quiet
from lightning_grad.core.views.weight_view import InPlaceView, InPlaceWindow, open_windows
from lightning_grad.testing import assert_identical, fit, make_classifier, make_trainer, state_of

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")


class Meter:
    """An average as people write it."""

    def __init__(self) -> None:
        self.name, self.sum, self.count, self.values = "loss", 0.0, 0, []
        self.bins, self.last = np.zeros(2), (0.0, torch.zeros(1))

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1
        self.values.append(value)
        self.bins += value
        self.last = (value, self.last[1].add_(1))


class Part(pl.LightningModule):
    """A nested LightningModule that logs, when asked to: Lightning itself lets it log from hooks of its own only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.calls = 0
        self.logs = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.logs:
            self.log("nested", 1.0)
        return self.layer(x)


class Busy(pl.LightningModule):
    """Its step leaves a trace wherever one can be left."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.fixed = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.part = Part()
        self.teacher = nn.Linear(8, 3).requires_grad_(False)
        self.accuracy = MulticlassAccuracy(3)
        self.metrics = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("empty", None)
        self.losses: list[Any] = []
        self.nested = {"a": [1, {"b": [0.0]}], "tensor": torch.zeros(2), "array": np.zeros(2)}
        self.indices = {3}
        self.recent: deque[float] = deque(maxlen=2)
        self.number, self.word, self.nothing = 0, "before", None
        self.average, self.array = torch.zeros(3), np.zeros(3)
        self.cpu_generator = torch.Generator().manual_seed(0)
        self.numpy_generator, self.numpy_state = np.random.default_rng(0), np.random.RandomState(0)
        self.python_random = random.Random(0)
        self.meter = Meter()
        self.hidden: Any = (torch.zeros(2), [0.0])
        self.kept: Any = (torch.zeros(2), [0.0])
        self.loss_class: Any = nn.MSELoss
        self.fails = self.is_changing_weights = False
        self.saw: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.part(self.fixed(self.body(x)))
        loss = F.cross_entropy(logits, y)
        self._count(loss.item(), logits.detach(), y)
        self._draw()
        self._log(loss)
        with torch.no_grad():
            for own, other in zip(self.part.layer.parameters(), self.teacher.parameters(), strict=True):
                other.lerp_(own, 0.1)
            if self.is_changing_weights:
                self.part.layer.weight.mul_(1.01)
        if self.fails:
            raise KeyError("on purpose")
        return loss

    def _count(self, loss: float, logits: Tensor, y: Tensor) -> None:
        self.losses.append([loss])
        self.nested["a"][1]["b"].append(loss)
        self.nested["tensor"].add_(1)
        self.nested["array"] += loss
        self.nested["new"] = logits
        self.indices.add(self.number)
        self.recent.append(loss)
        self.number, self.word, self.nothing = self.number + 1, "after", 1
        self.average.mul_(0.9)
        self.average = self.average + 1
        self.array += loss
        self.meter.update(loss)
        self.made_in_step = logits
        self.hidden = (self.hidden[0] + 1, [loss])
        self.kept[0].add_(1)
        self.kept[1].append(loss)
        self.loss_class = nn.L1Loss
        self.seen += 1
        self.empty = logits
        self.accuracy(logits, y)
        self.metrics(torch.tensor(loss))
        self.train()

    def _draw(self) -> None:
        random.random(), np.random.rand(), torch.rand(1)
        torch.rand(1, generator=self.cpu_generator)
        self.numpy_generator.random(), self.numpy_state.rand(), self.python_random.random()

    def _log(self, loss: Tensor) -> None:
        self.log("loss", loss)
        self.log("accuracy", self.accuracy)
        self.log_dict({"two": 2.0, "three": 3.0}, on_step=True, on_epoch=True)
        self.print("loud")
        self.logger.log_metrics({"direct": 1.0})
        self.logger.experiment.anything.at_all(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Record(Logger):
    """Remembers every call; the experiment takes whatever is called on it."""

    name = version = None

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(f"metrics {sorted(metrics)}")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("hyperparameters")

    @property
    def experiment(self) -> Any:
        self.calls.append("experiment")
        return self

    @property
    def anything(self) -> Any:
        return self

    def at_all(self, value: int) -> None:
        self.calls.append("experiment called")


class Look(pl.Callback):
    """Runs steps quietly where an epoch begins, and before each batch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        with quiet(trainer, pl_module):
            for number in range(2):
                pl_module.training_step(batch_of(trainer), number)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with quiet(trainer, pl_module):
            pl_module.training_step(batch, 0)


def batch_of(trainer: Any) -> Any:
    dataset = trainer.train_dataloader.dataset
    return dataset[:4]


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(12, 4, generator=generator), torch.arange(12) % 3), 4)


def make_busy() -> Busy:
    pl.seed_everything(3, verbose=False)
    module = Busy()
    module.fixed.eval()
    return module


def run(module: Any, *callbacks: Any, **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(callbacks=list(callbacks), max_epochs=2, log_every_n_steps=1, **arguments)
    trainer.fit(module, data())
    return trainer


def everything_in(module: nn.Module) -> dict[str, Any]:
    """Copy what every module holds, and the identities of the objects, the random streams too."""
    found: dict[str, Any] = {"random": [random.getstate(), np.random.get_state(), torch.get_rng_state()]}
    for name, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in ("_modules", "_trainer")}
        gradients = [None if p.grad is None else p.grad.clone() for p in part.parameters(recurse=False)]
        found[name] = (copy.deepcopy({key: plain(value) for key, value in own.items()}), gradients)
        found[f"{name} objects"] = {key: id(value) for key, value in own.items() if not isinstance(value, (int, float))}
    return found


def plain(value: Any) -> Any:
    """Turn generators and small objects into something that can be compared."""
    if isinstance(value, (torch.Generator, np.random.RandomState)):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return value.getstate()
    return vars(value) if isinstance(value, Meter) else value


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, (Tensor, np.ndarray)):
        assert np.array_equal(
            np.asarray(a.detach() if isinstance(a, Tensor) else a), np.asarray(torch.as_tensor(b).detach())
        ), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple, deque)):
        assert type(a) is type(b), where
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}/{index}")
    else:
        assert a == b, where


@pytest.fixture
def busy() -> tuple[pl.Trainer, Busy]:
    """A module that has trained, with states and gradients to lose, and the trainer that it can log to."""
    module = make_busy()
    trainer = run(module, logger=Record())
    trainer.logger.calls.clear()
    module.part.logs = True
    module.fixed.eval()
    del module.made_in_step
    module.part.layer.weight.grad = torch.ones_like(module.part.layer.weight)
    return trainer, module


def test_nothing_in_any_module_has_changed(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    before = everything_in(module)
    with quiet(trainer, module):
        module.training_step(batch_of(trainer), 0)
        module.training_step(batch_of(trainer), 1).backward()
        assert module.number == before[""][0]["number"] + 2  # or nothing would be put back
    assert_same(before, everything_in(module))
    assert not module.fixed.training
    assert not module.fixed[1].training
    assert module.body[1].training


def test_the_module_is_in_eval_mode(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    with quiet(trainer, module):
        assert not any(part.training for part in module.modules())
        first, second = (module.body(torch.ones(2, 4)) for _ in range(2))
        assert torch.equal(first, second)


def test_nothing_has_changed_after_an_exception(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    module.fails = True
    before, loggers = everything_in(module), trainer.loggers
    with pytest.raises(KeyError, match="on purpose"), quiet(trainer, module):
        module.training_step(batch_of(trainer), 0)
    assert_same(before, everything_in(module))
    assert trainer.loggers is loggers
    assert not is_quiet(module)


def test_no_logger_hears_of_it(busy: tuple[pl.Trainer, Busy], capsys: pytest.CaptureFixture[str]) -> None:
    trainer, module = busy
    with quiet(trainer, module):
        module.training_step(batch_of(trainer), 0)
    assert trainer.logger.calls == []
    assert capsys.readouterr().out == ""
    for part in (module, module.part):
        assert not {"log", "log_dict", "print"} & set(vars(part))


def test_a_fit_is_the_same_with_and_without_looking(tmp_path: Path) -> None:
    found = []
    for folder, callbacks in (("plain", []), ("looked", [Look()])):
        module = make_busy()
        module._log = lambda loss, own=module: own.log("loss", loss, on_step=True, on_epoch=True)
        trainer = run(module, *callbacks, logger=CSVLogger(tmp_path / folder, name="", version=""))
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        found.append((state_of(trainer, module), metrics, (tmp_path / folder / "metrics.csv").read_text()))
    plain_run, looked = found
    assert_identical(plain_run[0], looked[0])
    assert plain_run[1:] == looked[1:]


def test_csv_gets_no_row(tmp_path: Path) -> None:
    module = make_busy()
    module._log = lambda loss: module.logger.log_metrics({"direct": loss.item()}, step=module.number)
    before: list[int] = []

    class Count(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            rows = trainer.logger.experiment.metrics
            before.append(len(rows))
            with quiet(trainer, pl_module):
                pl_module.training_step(batch_of(trainer), 0)
            assert len(rows) == before[-1]

    run(module, Count(), logger=CSVLogger(tmp_path))
    assert len(before) == 2
    assert before[1] > 0


def test_a_parameter_that_is_trained_may_not_change(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    module.is_changing_weights = True
    with (
        pytest.raises(RuntimeError, match=r"'part\.layer\.weight'.*batch_end, or not\."),
        quiet(trainer, module, advice=", or not"),
    ):
        module.training_step(batch_of(trainer), 0)


def test_a_parameter_of_complex_numbers_may_not_change() -> None:
    module = Busy()
    module.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    with pytest.raises(RuntimeError, match="'phase'"), quiet(make_trainer(), module):
        module.phase.data.mul_(1j).add_(1)


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf, -math.inf], [6e4, 6e4]])
def test_parameters_that_have_gone_out_of_bounds_are_not_said_to_change(values: list[float]) -> None:
    module = Busy()
    module.register_parameter("far", nn.Parameter(torch.tensor(values, dtype=torch.float16)))
    with quiet(make_trainer(), module):
        pass
    module.far.data.fill_(6e4)
    with pytest.raises(RuntimeError, match="'far'"), quiet(make_trainer(), module):
        module.far.data[1] /= 2


def test_a_large_frozen_base_may_not_change_either(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    module.body.requires_grad_(False)
    module.fixed.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'teacher\.weight'"), quiet(trainer, module):
        module.training_step(batch_of(trainer), 0)


def test_is_quiet_only_inside(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    assert not is_quiet(module)
    with quiet(trainer, module):
        assert is_quiet(module)
        assert not is_quiet(make_busy())
    assert not is_quiet(module)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_code_runs_eagerly_inside_and_compiled_afterwards(in_place: bool) -> None:
    torch._dynamo.reset()
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def compiled(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return compiled

    module, trainer = make_classifier(), make_trainer()
    if in_place:
        module.mix.compile(backend=backend)
    else:
        module.mix = torch.compile(module.mix, backend=backend)
    x = torch.ones(2, 4, 16)
    with quiet(trainer, module):
        inside = module.mix(x)
    assert ran == []
    assert torch.equal(module.mix(x), inside)
    assert ran == [1]


def test_masks_are_seen_and_weights_dense_again() -> None:
    class Check(pl.Callback):
        looked = 0

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch < 2:
                return
            dense = pl_module.mix._parameters["w"].detach().clone()
            weights: list[Tensor] = []
            handle = pl_module.mix.register_forward_hook(
                lambda mix, *_: weights.append(mix._parameters["w"].detach().clone())
            )
            with quiet(trainer, pl_module):
                pl_module.training_step(batch_of(trainer), 0)
            handle.remove()
            share = (weights[0] == 0).float().mean()
            assert share == 0.75
            assert torch.equal(pl_module.mix._parameters["w"], dense)
            assert (dense != 0).all()
            self.looked += 1

    def train(*callbacks: Any) -> Any:
        sparse = NMSparsity(pattern="1:4", include=["mix.w"], recipe="sr-ste")
        return fit([sparse, *callbacks], make_classifier())

    check = Check()
    expected, found = (state_of(*train(*callbacks)) for callbacks in ([], [check]))
    assert check.looked == 2
    assert_identical(expected, found)


def test_the_module_can_be_pickled_afterwards(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    with quiet(trainer, module):
        module.training_step(batch_of(trainer), 0)
    again = pickle.loads(pickle.dumps(module))
    assert_identical(dict(module.state_dict()), dict(again.state_dict()))
    assert again.number == module.number


def test_a_second_look_leaves_no_more_than_the_first(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    before = everything_in(module)
    for _ in range(2):
        with quiet(trainer, module):
            module.training_step(batch_of(trainer), 0)
    assert_same(before, everything_in(module))


# As training goes on: in its own modes, as often as once a step, and one look inside of another.


def test_modes_stay_where_nothing_is_evaluated(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    before = everything_in(module)
    with quiet(trainer, module, evaluate=False):
        assert [module.training, module.body[1].training, module.fixed.training] == [True, True, False]
        module.training_step(batch_of(trainer), 0)
        first, second = (module.body(torch.ones(2, 4)) for _ in range(2))
        assert not torch.equal(first, second)  # there is dropout
        assert module.fixed.training  # the step has called train()
    assert_same(before, everything_in(module))
    assert not module.fixed.training


@pytest.mark.parametrize("evaluate", [True, False])
def test_compiled_code_runs_compiled_where_nothing_is_evaluated(evaluate: bool) -> None:
    torch._dynamo.reset()
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def compiled(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return compiled

    module, x = make_classifier(), torch.ones(2, 4, 16)
    module.mix.compile(backend=backend)
    expected = module.mix(x)
    for _ in range(2):
        with quiet(make_trainer(), module, evaluate=evaluate):
            assert torch.equal(module.mix(x), expected)
    assert len(ran) == (1 if evaluate else 3)


def test_parameters_are_not_read_where_nothing_is_checked(
    busy: tuple[pl.Trainer, Busy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(parameter: Tensor) -> Tensor:
        raise AssertionError("read")

    trainer, module = busy
    before = everything_in(module)
    monkeypatch.setattr(sys.modules[quiet.__module__], "_checksum", refuse)
    with pytest.raises(AssertionError, match="read"), quiet(trainer, module):
        pass
    with quiet(trainer, module, check=False):
        module.training_step(batch_of(trainer), 0)
    assert_same(before, everything_in(module))


def test_a_look_inside_of_another_leaves_the_outer_one_as_it_is(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    before, loggers = everything_in(module), trainer.loggers
    with quiet(trainer, module, evaluate=False):
        module.training_step(batch_of(trainer), 0)
        between = everything_in(module.body), module.number, list(module.losses), torch.get_rng_state()
        with quiet(trainer, module):
            assert not module.body.training
            module.training_step(batch_of(trainer), 1)
        assert_same(between, (everything_in(module.body), module.number, list(module.losses), torch.get_rng_state()))
        assert is_quiet(module)
        module.training_step(batch_of(trainer), 2)
    assert not is_quiet(module)
    assert trainer.loggers is loggers
    assert trainer.logger.calls == []
    assert_same(before, everything_in(module))


class Halved:
    """A view that is easily told from the weight."""

    def value(self, dense: Tensor) -> Tensor:
        return dense / 2

    def stored(self, dense: Tensor) -> Tensor:
        return dense.clone() / 2


def test_windows_that_were_open_stay_open_and_others_are_closed() -> None:
    module, trainer = make_classifier(), make_trainer()
    weight = module.mix.w
    dense = weight.detach().clone()
    window = InPlaceWindow(module, [InPlaceView(module.mix, "w", Halved())])
    batch = (torch.ones(2, 4, 16), torch.zeros(2, dtype=torch.long))
    with quiet(trainer, module):
        module.training_step(batch, 0)
        assert torch.equal(weight, dense / 2)
    assert torch.equal(weight, dense)
    window.open()
    with quiet(trainer, module):
        module.training_step(batch, 0)
    assert open_windows(module) == [window]
    assert torch.equal(weight, dense / 2)
    with quiet(trainer, module), quiet(trainer, module):
        pass
    assert torch.equal(weight, dense / 2)
    window.close()
    assert torch.equal(weight, dense)
    window.remove()


@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda: defaultdict(list)])
@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_dictionary_that_was_empty_is_emptied_again(kind: Any, is_replaced: bool) -> None:
    module = make_classifier()
    module.mix.cache = cache = kind()
    with quiet(make_trainer(), module):
        if is_replaced:
            module.mix.cache = {"other": 1}
        cache["key"] = [1.0]
    assert module.mix.cache is cache
    assert dict(cache) == {}
    cache["kept"] = [2.0]
    with quiet(make_trainer(), module):
        cache["kept"].append(3.0)
        cache["key"] = [1.0]
    assert dict(cache) == {"kept": [2.0]}


def test_hooks_that_a_step_adds_are_gone_again() -> None:
    module = make_classifier()
    with quiet(make_trainer(), module):
        module.mix.register_forward_hook(lambda *_: None)
    assert not module.mix._forward_hooks


def test_loggers_alone_are_mute(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    before, loggers = everything_in(module), trainer.loggers
    with loggers_muted(trainer):
        module.logger.log_metrics({"direct": 1.0})
        trainer.logger.experiment.anything.at_all(1)
    assert trainer.loggers is loggers
    with pytest.raises(KeyError), loggers_muted(trainer):
        raise KeyError
    assert trainer.loggers is loggers
    assert loggers[0].calls == []
    assert_same(before, everything_in(module))


class Member:
    """A record whose parts know it."""

    def __init__(self, owner: Any = None) -> None:
        self.count, self.owner, self.members = 0, owner, []


def test_attributes_that_lead_back_to_themselves_are_put_back(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    club = Member()
    club.members.append(Member(club))
    module.python_logger, module.club, module.ring = logging.getLogger("test"), club, [1]
    module.ring.append(module.ring)
    with quiet(trainer, module):
        module.ring.append(2)
        club.count = club.members[0].count = 5
        club.members[0].owner = None
        club.members.append(Member(club))
    assert module.ring[0] == 1
    assert module.ring[1] is module.ring
    assert len(module.ring) == 2
    assert len(club.members) == 1
    assert (club.count, club.members[0].count) == (0, 0)
    assert club.members[0].owner is club


def test_a_recurrent_layer_has_a_gradient_in_eval_mode(busy: tuple[pl.Trainer, Busy]) -> None:
    trainer, module = busy
    assert torch.backends.cudnn.enabled
    with quiet(trainer, module):
        assert torch.backends.cudnn.enabled
    module.recurrent = nn.LSTM(2, 2)
    with quiet(trainer, module, evaluate=False):
        assert torch.backends.cudnn.enabled
    with quiet(trainer, module):
        assert not torch.backends.cudnn.enabled  # cuDNN refuses it
    assert torch.backends.cudnn.enabled


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_is_put_back() -> None:
    class WithScript(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))

    module = WithScript()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with quiet(make_trainer(), module, evaluate=False):
        module.part(torch.randn(4, 2))
    with quiet(make_trainer(), module):
        assert not module.part.training
    assert module.part.training
    assert all(child.training for child in module.part.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
