"""Data that is loaded again, or that a resumed run finds: the same samples go on, others are refused by name."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_grad.callbacks import DataPruning, InfoBatch, RepeatedRandomSubset, UniformLearning
from lightning_grad.data.fingerprints import mark_of
from lightning_grad.testing import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
TOTAL, BATCH = 48, 8


def samples(seed: int = 0, total: int = TOTAL) -> TensorDataset:
    x = torch.randn(total, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


KEPT = samples()


class Net(pl.LightningModule):
    """Makes its data whenever it is asked for it."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        pl.seed_everything(3, verbose=False)
        self.layer = torch.nn.Linear(4, 3)
        self.make, self.made, self.batches = make, 0, 0

    def train_dataloader(self) -> Any:
        self.made += 1
        return DataLoader(self.make(self.made), BATCH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches += self.training
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


TECHNIQUES: dict[str, Any] = {
    "el2n": lambda **more: DataPruning(0.5, epoch=1, figure=False, num_shown=0, **more),
    "aum": lambda **more: DataPruning(0.5, "aum", epoch=2, figure=False, num_shown=0, **more),
    "random": lambda **more: DataPruning(0.5, keep="random", epoch=0, **more),
    "infobatch": InfoBatch,
    "uniform": lambda **more: UniformLearning(epoch=1, **more),
}
FRESH: dict[str, Any] = {  # records an epoch first
    "aum": lambda name: DataPruning(0.5, "aum", epoch=3, figure=False, num_shown=0, name=name)
}
INDIFFERENT: dict[str, Any] = {
    "subsets": RepeatedRandomSubset,
    "no pruning": lambda: DataPruning(0.0, epoch=1, figure=False, num_shown=0),
    "infobatch that drops none": lambda: InfoBatch(prune=0.0),
    "no repeats": lambda: UniformLearning(epoch=1, repeats=0),
}


def fit(make: Any, callbacks: list[Any], every: int = 1, ckpt: Any = None, epochs: int = 3) -> Net:
    net = Net(make)
    saves = any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks)
    arguments: dict[str, Any] = {"reload_dataloaders_every_n_epochs": every, "enable_checkpointing": saves}
    trainer = make_trainer(callbacks=callbacks, max_epochs=epochs, **arguments)
    trainer.fit(net, ckpt_path=ckpt)
    return net


@pytest.mark.parametrize("name", TECHNIQUES)
def test_other_samples_are_refused_by_name_and_the_way_out_works(name: str) -> None:
    spy = Batches()
    says = r"the training set TensorDataset, loaded again, has other samples than at the start of the fit\. Different: "
    with pytest.raises(
        ValueError, match=rf"^(DataPruning|InfoBatch|UniformLearning) identifies .*{says}the items .*=0 to load"
    ):
        fit(samples, [TECHNIQUES[name](), spy])
    assert spy.count == TOTAL // BATCH * (0.5 if name == "random" else 1), "refused as soon as it is loaded"
    assert fit(samples, [TECHNIQUES[name]()], every=0).made == 1
    assert fit(lambda made: samples(5), [TECHNIQUES[name]()]).made == 3, "made again with a fixed seed"


class Batches(pl.Callback):
    count = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("name", INDIFFERENT)
def test_what_remembers_no_sample_takes_any(name: str) -> None:
    assert fit(samples, [INDIFFERENT[name]()]).made == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda made: KEPT,
        lambda made: samples(0),
        lambda made: samples(0) if made % 2 else Subset(samples(0), range(TOTAL)),
        lambda made: TensorDataset(*KEPT.tensors),
    ],
    ids=["the same object", "made again", "another class", "the same memory"],
)
def test_the_same_samples_go_on_and_nothing_changes(make: Any) -> None:
    reloaded, once = (fit(make, [InfoBatch()], every=every) for every in (1, 0))
    assert torch.equal(reloaded.layer.weight, once.layer.weight)


def test_samples_that_are_written_over_are_noticed() -> None:
    kept = samples()

    def make(made: int) -> TensorDataset:
        kept.tensors[0].add_(made - 1)  # in place
        return TensorDataset(*kept.tensors)

    with pytest.raises(ValueError, match="loaded again, has other samples"):
        fit(make, [InfoBatch()])


@pytest.mark.parametrize("make", [lambda made: samples(0, TOTAL + made), lambda made: samples(0, TOTAL - made)])
def test_another_length_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"identifies samples by index, but the training set had \d+ samples"):
        fit(make, [InfoBatch()])


# What comparing does to the data.


class Augmented(Dataset[Any]):
    """Draws from the global streams and from its own; opens its file when it is first read."""

    def __init__(self) -> None:
        self.base = samples()
        self.generator = torch.Generator().manual_seed(1)
        self.file: Any = None

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, index: int) -> Any:
        self.file = self.file or object()
        x, y = self.base[index]
        return x + torch.randn(4) + torch.randn(4, generator=self.generator), y


def test_augmented_data_is_known_by_length_and_class_and_is_left_as_it_is() -> None:
    made: list[Augmented] = []

    def make(number: int) -> Augmented:
        made.append(Augmented())
        return made[-1]

    plain = fit(make, [])
    watched = fit(make, [InfoBatch(prune=0.0)])
    assert torch.equal(plain.layer.weight, watched.layer.weight)
    fit(make, [InfoBatch()])
    with pytest.raises(ValueError, match=r"Different: the class \(TensorDataset against Augmented\)"):
        fit(lambda number: make(number) if number == 2 else samples(), [InfoBatch()])
    data = Augmented()
    states = data.generator.get_state(), torch.get_rng_state()
    assert mark_of(Subset(data, range(TOTAL))).items is None
    assert data.file is None, "what is opened for comparing is not shared with workers"
    assert torch.equal(data.generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])


class OfWorkers(Dataset[Any]):
    """Can be read by workers only."""

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, index: int) -> Any:
        if torch.utils.data.get_worker_info() is None:
            raise RuntimeError("not here")
        return samples()[index]


def test_data_that_cannot_be_read_here_is_known_by_length_and_class() -> None:
    mark = mark_of(OfWorkers())
    assert (mark.length, mark.class_name, mark.items) == (TOTAL, "OfWorkers", None)


# Resuming.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("other_data")

    def checkpoint(name: str, epochs: int = 2) -> Path:
        path = folder / f"{name}-epoch={epochs - 1}.ckpt"
        if not path.exists():
            saver = pl.callbacks.ModelCheckpoint(folder, filename=f"{name}-{{epoch}}", save_top_k=-1)
            fit(lambda made: samples(), [{**TECHNIQUES, **INDIFFERENT}[name](), saver], every=0)
        return path

    return checkpoint


@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("total", [TOTAL, TOTAL + 8])
def test_a_run_that_resumes_with_other_data_is_refused_and_the_ways_out_work(
    name: str, total: int, checkpoints: Any
) -> None:
    says = r"in this run, has other samples than in the run of the checkpoint\. Different: "
    spy = Batches()
    with pytest.raises(ValueError, match=says):
        fit(lambda made: samples(1, total), [TECHNIQUES[name](), spy], ckpt=checkpoints(name), every=0, epochs=4)
    assert spy.count == 0
    fit(lambda made: samples(), [TECHNIQUES[name]()], ckpt=checkpoints(name), every=0, epochs=4)
    fit(
        lambda made: samples(1, total),
        [FRESH.get(name, TECHNIQUES[name])(name="fresh")],
        ckpt=checkpoints(name),
        every=0,
        epochs=4,
    )


@pytest.mark.parametrize("name", [*INDIFFERENT, "el2n"])
def test_a_run_that_remembers_no_sample_yet_resumes_with_other_data(name: str, checkpoints: Any) -> None:
    epochs = 1 if name == "el2n" else 2
    technique = {**TECHNIQUES, **INDIFFERENT}[name]()
    net = fit(lambda made: samples(1), [technique], ckpt=checkpoints(name, epochs=epochs), every=0, epochs=3)
    assert net.batches > 0


def test_a_choice_that_does_not_fit_is_refused_in_words(checkpoints: Any) -> None:
    def resume(**arguments: Any) -> Net:
        technique = RepeatedRandomSubset(**arguments)
        return fit(lambda made: samples(1, 16), [technique], ckpt=checkpoints("subsets"), every=0, epochs=4)

    with pytest.raises(
        ValueError, match=r"RepeatedRandomSubset would train on sample \d+, but the training set has 16"
    ):
        resume()
    assert resume(name="fresh").batches > 0
