"""Values are credited to their own samples, or the technique refuses; each way out that it names works."""

import copy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset, default_collate

from lightning_grad.callbacks import DataPruning, InfoBatch, LossReweighting, RepeatedRandomSubset, UniformLearning
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.testing import assert_identical, state_of
from tests.callbacks.data_pruning.test_data_pruning import (
    BY_HAND,
    SAMPLES,
    Classifier,
    Fixed,
    Manual,
    make_data,
    scores_of,
    train,
)

KEEP = "collate_fn changes the order.*Make collate_fn keep the order"
STEP = r"training_step arranges them differently.*torch\.stack"


def training_data(trainer: pl.Trainer) -> Any:
    return trainer.train_dataloader.dataset


def pruning(score: Any = "el2n", prune: float = 0.5, **arguments: Any) -> DataPruning:
    if score == "less":
        arguments = {"target": training_data, **arguments}
    return DataPruning(prune, score, **{"epoch": 1, "num_shown": 0, "figure": False, **arguments})


def length(item: Any) -> float:
    return float(item[0].sum())


def by_length(items: list[Any]) -> Any:
    return default_collate(sorted(items, key=length, reverse=True))


def backwards(items: list[Any]) -> Any:
    return default_collate(items[::-1])


def evens_first(items: list[Any]) -> Any:
    return default_collate([*items[::2], *items[1::2]])


def batches(collate: Any, dataset: Any = None, batch_size: int = 8) -> Any:
    generator = torch.Generator().manual_seed(2)
    given = make_data() if dataset is None else dataset
    return DataLoader(given, batch_size, shuffle=True, collate_fn=collate, generator=generator)


# What collate_fn does.

SCORES = ["el2n", "grand", "grand-last", "loss", "margin", "aum", "forgetting", "prototypes", "vog", "less"]


@pytest.mark.parametrize("collate", [by_length, backwards, evens_first])
@pytest.mark.parametrize("make", [pruning, InfoBatch, lambda: UniformLearning(epoch=1)])
def test_a_collate_function_that_reorders_is_refused(make: Any, collate: Any) -> None:
    with pytest.raises(RuntimeError, match=KEEP):
        train(make(), loader=batches(collate))


@pytest.mark.parametrize("score", SCORES)
def test_it_is_refused_for_every_score(score: str) -> None:
    with pytest.raises(RuntimeError, match=KEEP):
        train(pruning(score, epoch=2, checkpoints=2), epochs=3, loader=batches(by_length))


def test_it_is_refused_for_a_function_and_for_classes_to_balance() -> None:
    for callback in (
        pruning(score_fn=lambda module, batch: module(batch[0])[:, 0]),
        pruning(keep="random", balance="class"),
    ):
        with pytest.raises(RuntimeError, match=KEEP):
            train(callback, loader=batches(by_length))


def test_a_batch_of_two_that_is_sorted_is_refused() -> None:
    with pytest.raises(RuntimeError, match=KEEP):
        train(pruning(), loader=batches(by_length, batch_size=2))


@pytest.mark.parametrize("make", [RepeatedRandomSubset, lambda: pruning(keep="random"), LossReweighting])
def test_who_credits_nothing_to_an_index_does_not_mind(make: Any) -> None:
    train(make(), loader=batches(by_length))


class SortsAndPutsBack(Classifier):
    """Sorts its rows for a layer, and puts them back before the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch[0].sum(1).argsort(descending=True)
        logits = self(batch[0][order])[order.argsort()]
        return F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize(
    "score", sorted(BY_HAND.keys() - {"grand-last", "prototypes"})
)  # they need the layer's own output
def test_a_step_that_puts_the_rows_back_is_scored_exactly(score: str) -> None:
    values, module = scores_of(pruning(score), SortsAndPutsBack())
    expected = BY_HAND[score](module, *make_data().tensors[:2]).detach().double()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


class Packed(Classifier):
    """A recurrent network on sequences of different length, which torch sorts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(1, 8, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, lengths, y = batch
        packed = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(2), lengths, True, enforce_sorted=False)
        return F.cross_entropy(self.head(self.recurrent(packed)[1][0]), y)


def padded(items: list[Any]) -> Any:
    rows = [x[: 1 + int(index) % 6] for x, _, index in items]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, torch.stack([y for _, y, _ in items])


def padded_and_sorted(items: list[Any]) -> Any:
    return padded(sorted(items, key=lambda item: -(int(item[2]) % 6)))


@pytest.mark.parametrize("make", [pruning, InfoBatch, lambda: pruning("forgetting")])
def test_packed_sequences(make: Any) -> None:
    train(make(), Packed(), loader=batches(padded))
    with pytest.raises(RuntimeError, match=KEEP):
        train(make(), Packed(), loader=batches(padded_and_sorted))


def test_sequences_of_equal_length_at_the_front_do_not_hide_the_order() -> None:
    x, y, index = make_data(64).tensors
    x[:16] = 1.0  # as long as each other
    with pytest.raises(RuntimeError, match=KEEP):
        train(pruning(), loader=batches(by_length, TensorDataset(x, y, index)))


# What the step does.


class TwoViews(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(self(torch.cat([x, -x])), torch.cat([y, y]))


class ViewsTogether(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return F.cross_entropy(self(torch.stack([x, -x], 1).flatten(0, 1)), y.repeat_interleave(2))


class HalfTwice(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        half = max(1, len(x) // 2)
        rows = torch.arange(len(x)) % half
        return F.cross_entropy(self(x[rows]), y[rows])


class Sorts(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch[0].sum(1).argsort()
        return F.cross_entropy(self(batch[0][order]), batch[1][order])


class SortsInPython(Classifier):
    """Hides from torch what it does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch[0].sum(1).numpy().argsort().tolist()
        return F.cross_entropy(
            self(torch.stack([batch[0][i] for i in order])), torch.stack([batch[1][i] for i in order])
        )


class TimeFirst(Classifier):
    """Lays out the rows of all samples by time."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        steps = torch.stack([x, -x, x / 2])
        return F.cross_entropy(self(steps.flatten(0, 1)), y.repeat(3))


STEPS = [TwoViews, HalfTwice, Sorts, SortsInPython, TimeFirst]
READERS = [pruning, lambda: pruning("aum"), InfoBatch, lambda: LossReweighting(warmup_fraction=0.0)]


@pytest.mark.parametrize("module", STEPS)
@pytest.mark.parametrize("make", READERS, ids=["el2n", "aum", "info", "reweighting"])
def test_a_step_that_arranges_rows_otherwise_is_refused(make: Any, module: Any) -> None:
    callback = make()
    if isinstance(callback, LossReweighting) and module in (Sorts, SortsInPython):
        train(callback, module())  # each row is weighted by its own loss, in whichever order
        return
    with pytest.raises(RuntimeError, match=STEP):
        train(callback, module())


@pytest.mark.parametrize("make", READERS, ids=["el2n", "aum", "info", "reweighting"])
def test_views_of_a_sample_together_are_its_rows(make: Any) -> None:
    train(make(), ViewsTogether())


@pytest.mark.parametrize("score", ["el2n", "loss", "grand"])
def test_views_of_a_sample_together_are_scored_exactly(score: str) -> None:
    values, module = scores_of(pruning(score), ViewsTogether())
    x, y, _ = make_data().tensors
    pair = lambda i: (module(torch.stack([x[i], -x[i]])), y[i].repeat(2))  # noqa: E731
    if score == "grand":
        expected = []
        for i in range(SAMPLES):
            module.zero_grad()
            F.cross_entropy(*pair(i)).backward()
            expected.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())
    elif score == "loss":
        expected = [F.cross_entropy(*pair(i)).detach() for i in range(SAMPLES)]
    else:
        logits = torch.stack([pair(i)[0].softmax(1) for i in range(SAMPLES)])
        expected = list((logits - F.one_hot(y, 3).unsqueeze(1)).norm(dim=2).mean(1).detach())
    torch.testing.assert_close(values, torch.stack(expected).double(), rtol=1e-4, atol=1e-6)


def test_weights_of_views_together_are_those_of_the_samples() -> None:
    seen: list[Tensor] = []

    class Watched(ViewsTogether):
        learning_rate = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(loss.detach())
            return loss

    callback = LossReweighting(temperature=1.0, start_temperature=1.0, warmup_fraction=0.0)
    module = Watched()
    train(callback, module, epochs=1)
    assert len(seen) >= 3
    assert torch.stack(seen).isfinite().all()
    assert 0.0 < float(callback._effective) < 1.0


# Where there is nothing to see, or noise.


def test_samples_that_are_alike_are_not_refused() -> None:
    x, y, index = make_data().tensors
    alike = TensorDataset(torch.ones_like(x), torch.zeros_like(y), index)
    for make in (lambda: pruning("loss"), InfoBatch, lambda: LossReweighting(warmup_fraction=0.0)):
        train(make(), Fixed(), alike)


def with_vector(items: list[Any]) -> Any:
    """Add a tensor that is as long as the batch by chance."""
    return [*default_collate(items), torch.arange(8.0)]


class FourParts(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:3], batch_idx)


@pytest.mark.parametrize("make", [pruning, lambda: pruning("aum"), InfoBatch])
def test_a_tensor_that_is_as_long_as_the_batch_by_chance(make: Any) -> None:
    train(make(), FourParts(), loader=batches(with_vector))


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        x, y, i = make_data()[index]
        return x + 0.1 * torch.randn(6), y, i


@pytest.mark.parametrize(
    "make", [InfoBatch, lambda: pruning("aum"), lambda: pruning(score_dataset=lambda _: make_data())]
)
def test_augmented_samples(make: Any) -> None:
    train(make(), loader=batches(default_collate, Augmented()))
    with pytest.raises(RuntimeError, match=KEEP):
        train(make(), loader=batches(by_length, Augmented()))


class Noise(Classifier):
    """Makes up what it learns, in eval mode too, as masked tokens are drawn."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] + torch.randn_like(batch[0])
        return F.mse_loss(self(x), torch.randn_like(x[:, :3]))


@pytest.mark.parametrize("make", [lambda: pruning("loss"), InfoBatch])
def test_noise_in_eval_mode_is_told_once_and_the_tensors_decide(make: Any) -> None:
    with pytest.warns(UserWarning, match="draws random numbers in eval mode.*relies on the tensors") as told:
        train(make(), Noise())
    assert len([w for w in told if "eval mode" in str(w.message)]) == 1
    with pytest.raises(RuntimeError, match=KEEP):
        train(make(), Noise(), loader=batches(by_length))


class NoisyInput(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0] + torch.randn_like(batch[0])), batch[1])


class OwnNoise(Classifier):
    """Draws the noise of its inputs from a generator of its own, which no global seed reaches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=self.generator)
        return F.cross_entropy(self(batch[0] + noise), batch[1])


class OwnNoiseOfBatches:
    """A collate function whose noise comes from a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __call__(self, items: list[Any]) -> Any:
        x, *rest = default_collate(items)
        return [x + torch.from_numpy(self.generator.normal(size=x.shape)).to(x), *rest]


@pytest.mark.parametrize("make", [pruning, InfoBatch])
def test_noise_from_generators_of_their_own_is_told_from_a_wrong_order(make: Any) -> None:
    train(make(), OwnNoise())
    train(make(), Classifier(), loader=batches(OwnNoiseOfBatches()))


class NoisyInputSorted(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch[0].sum(1).argsort()
        return F.cross_entropy(self(batch[0][order] + torch.randn_like(batch[0])), batch[1][order])


@pytest.mark.parametrize("make", [pruning, InfoBatch])
def test_targets_tell_the_order_where_the_input_has_noise(make: Any) -> None:
    train(make(), NoisyInput())
    with pytest.raises(RuntimeError, match=STEP):
        train(make(), NoisyInputSorted())


def test_a_step_that_cannot_be_run_is_judged_by_the_tensors_of_its_batch() -> None:
    train(pruning("aum"), Manual())
    with pytest.raises(RuntimeError, match=KEEP):
        train(pruning("aum"), Manual(), loader=batches(by_length))


class Pairs(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["own"], batch_idx)


@pytest.mark.parametrize("collate", [default_collate, by_length])
def test_one_of_several_loaders_is_judged_by_its_tensors(collate: Any) -> None:
    loaders = {"own": batches(collate), "other": batches(default_collate)}
    if collate is default_collate:
        train(InfoBatch(loader_key="own"), Pairs(), loader=loaders)
        return
    with pytest.raises(RuntimeError, match=KEEP):
        train(InfoBatch(loader_key="own"), Pairs(), loader=loaders)


@pytest.mark.parametrize(
    ("score_fn", "is_right"),
    [
        (lambda module, batch: module(batch[0])[:, 0], True),
        (lambda module, batch: module(batch[0])[:, 0].sort().values, False),
    ],
)
def test_scores_of_a_function_follow_the_samples(score_fn: Any, is_right: bool) -> None:
    if is_right:
        train(pruning(score_fn=score_fn))
        return
    with pytest.raises(RuntimeError, match="in the order of the batch"):
        train(pruning(score_fn=score_fn))


# What it costs, and leaves behind.


class Dropping(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.body.append(nn.Dropout(0.3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


REHEARSING = [*READERS, lambda: UniformLearning(epoch=1)]
NAMES = ["el2n", "aum", "info", "reweighting", "uniform"]
SAME_EPOCHS = [
    lambda: InfoBatch(0.5, prune_until=0.0),
    lambda: LossReweighting(warmup_fraction=0.0),
    lambda: pruning("aum", 0.0),
]


@pytest.mark.filterwarnings("ignore:DataPruning scores samples that differ")
@pytest.mark.parametrize("make", REHEARSING, ids=NAMES)
def test_the_rehearsal_leaves_no_trace(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for rehearses in (True, False):
        if not rehearses:
            for name in ("check_loader", "check_batch", "check_whole_loss"):
                monkeypatch.setattr(Rehearsal, name, lambda *_, **__: None)
        run = train(make(), Dropping(), Augmented(), epochs=3)
        states.append(state_of(run.trainer, run.module))
    assert_identical(*states)


def without_some(items: list[Any]) -> Any:
    """Leave out what cannot be used, as for images that cannot be read."""
    return default_collate([item for item in items if item[0][0] < 1.0])


class Shuffles(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = torch.randperm(len(batch[0]))
        return F.cross_entropy(self(batch[0][order]), batch[1][order])


class SortsInTraining(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch[0].sum(1).argsort() if self.training else torch.arange(len(batch[0]))
        return F.cross_entropy(self(batch[0][order]), batch[1][order])


class MixesInTraining(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[0], F.one_hot(batch[1], 3).float()
        if self.training:
            other, share = torch.randperm(len(x)), torch.rand(())
            x, y = share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]
        return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("make", [pruning, lambda: pruning("loss"), InfoBatch])
def test_a_step_that_shuffles_is_told_from_one_with_noise(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"same samples were run again, the losses did not follow.*torch\.stack"):
        train(make(), Shuffles())
    train(LossReweighting(warmup_fraction=0.0), Shuffles())


@pytest.mark.parametrize("make", [lambda: pruning("aum"), InfoBatch])
def test_a_step_that_sorts_in_training_only_is_refused_by_who_reads_losses_there(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"same samples were run again, the target of the loss did not follow"):
        train(make(), SortsInTraining())
    train(pruning("el2n"), SortsInTraining())
    train(InfoBatch(), MixesInTraining())


class SomeRows(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        chosen = batch[0][:, 0] < 1.0
        return F.cross_entropy(self(batch[0][chosen]), batch[1][chosen])


@pytest.mark.parametrize(
    "make", [pruning, lambda: pruning("aum"), InfoBatch, lambda: LossReweighting(warmup_fraction=0.0)]
)
@pytest.mark.parametrize("where", ["collate_fn", "step"])
def test_samples_that_have_no_row_are_refused_by_name(make: Any, where: str) -> None:
    callback = make()
    if where == "collate_fn" and isinstance(callback, LossReweighting):
        train(callback, loader=batches(without_some))  # which credits nothing to an index
        return
    if where == "step" and isinstance(callback, (InfoBatch, LossReweighting)):
        train(callback, SomeRows())  # the trace follows the rows of the samples
        return
    module, collate = (SomeRows(), default_collate) if where == "step" else (Classifier(), without_some)
    with pytest.raises(
        ValueError, match=rf"^{callback.display_name} .* loss of each sample\..* rows for 8 samples, so .* drops sampl"
    ):
        train(callback, module, loader=batches(collate))


AT_THE_TOP = np.random.default_rng(0)


class Resizing:
    """Counts its batches, as where each tenth has images of another size, and draws from a generator of the file."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, items: list[Any]) -> Any:
        self.calls += 1
        x, *rest = default_collate(items)
        return [x * (1 + self.calls % 3) * AT_THE_TOP.uniform(0.9, 1.1), *rest]


class DrawsFromTheFile(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0] * AT_THE_TOP.uniform(0.9, 1.1)), batch[1])


@pytest.mark.filterwarnings("ignore:.*(samples that differ|in eval mode)")
@pytest.mark.parametrize("make", REHEARSING, ids=NAMES)
def test_the_rehearsal_leaves_no_trace_in_what_the_file_holds(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for rehearses in (True, False):
        if not rehearses:
            for name in ("check_loader", "check_batch", "check_whole_loss"):
                monkeypatch.setattr(Rehearsal, name, lambda *_, **__: None)
        AT_THE_TOP.bit_generator.state = np.random.default_rng(0).bit_generator.state
        run = train(make(), DrawsFromTheFile(), loader=batches(Resizing()), epochs=3)
        states.append(state_of(run.trainer, run.module))
    assert_identical(*states)


@pytest.mark.parametrize("make", SAME_EPOCHS, ids=["info", "reweighting", "aum"])
def test_nothing_is_run_after_the_first_batch(make: Any) -> None:
    runs: list[int] = []

    class Counting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            runs.append(self.trainer.current_epoch)
            return super().training_step(batch, batch_idx)

    train(make(), Counting(), epochs=4)
    assert 3 < runs.count(0) <= 3 + 6
    assert runs.count(2) == runs.count(3) == 3


def test_the_module_can_be_copied_in_mid_fit() -> None:
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            copy.deepcopy(trainer.callbacks)

    train(LossReweighting(warmup_fraction=0.0), more=[Copies()])


class Table(Dataset[Any]):
    """Takes a list of indices, as tables of cells do, and may give their rows in the order in which it stores them."""

    def __init__(self, sorts: bool) -> None:
        self.sorts = sorts

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, indices: list[int]) -> Any:
        return make_data()[sorted(indices) if self.sorts else indices]


@pytest.mark.parametrize("make", [pruning, InfoBatch, lambda: pruning("aum")])
def test_a_data_set_that_takes_lists_of_indices(make: Any) -> None:
    def loader(sorts: bool) -> Any:
        drawing = RandomSampler(range(SAMPLES), generator=torch.Generator().manual_seed(2))
        return DataLoader(Table(sorts), batch_size=None, sampler=BatchSampler(drawing, 8, False))

    train(make(), loader=loader(False))
    with pytest.raises(RuntimeError, match=r"the data set changes the order.*Make the data set keep the order"):
        train(make(), loader=loader(True))


class Contrastive(Classifier):
    """Tells each sample from the others of its batch: the target is its place."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = self(batch[0]), self(-batch[0])
        return F.cross_entropy(one @ other.T, torch.arange(len(one)))


class ContrastiveSorted(Contrastive):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0][batch[0].sum(1).argsort()]], batch_idx)


@pytest.mark.parametrize("make", [lambda: pruning("loss"), InfoBatch, lambda: LossReweighting(warmup_fraction=0.0)])
def test_targets_that_are_places_in_the_batch(make: Any) -> None:
    train(make(), Contrastive())
    callback = make()
    if isinstance(callback, LossReweighting):
        train(callback, ContrastiveSorted())
        return
    with pytest.raises(RuntimeError, match=STEP):
        train(callback, ContrastiveSorted())


class ContrastiveViews(Classifier):
    """Draws the second view of each sample itself, in eval mode too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = self(batch[0]), self(batch[0] + 0.1 * torch.randn_like(batch[0]))
        return F.cross_entropy(one @ other.T, torch.arange(len(one)))


@pytest.mark.parametrize("make", [lambda: pruning("loss"), lambda: pruning("aum"), InfoBatch])
def test_places_in_the_batch_tell_nothing_where_the_views_are_noisy(make: Any) -> None:
    with pytest.warns(UserWarning, match="draws random numbers in eval mode.*relies on the tensors"):
        train(make(), ContrastiveViews())
    with pytest.raises(RuntimeError, match=KEEP):
        train(make(), ContrastiveViews(), loader=batches(by_length))


class Silent(Classifier):
    """Says the same of every sample at first."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[0][:, 0].sign())


class SilentSorted(Silent):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        order = batch[0].sum(1).argsort()
        return super().training_step([batch[0][order]], batch_idx)


class Sure(Silent):
    """Is so sure that its losses are rounding errors."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sure = self(batch[0]) + 40 * F.one_hot(batch[1], 3) * (1 + batch[0][:, :1].abs())
        return F.cross_entropy(sure + 1e-6 * torch.arange(len(sure))[:, None], batch[1])


def test_where_all_losses_are_alike_the_input_and_the_target_tell() -> None:
    class Still(Silent):
        learning_rate = 0.0

    class StillSorted(SilentSorted):
        learning_rate = 0.0

    train(pruning("loss"), Still())
    train(pruning("loss"), Sure())
    with pytest.raises(RuntimeError, match="the target of the loss did not follow"):
        train(pruning("loss"), StillSorted())


def test_two_views_in_batches_of_two() -> None:
    for make in READERS:
        with pytest.raises(RuntimeError, match=STEP):
            train(make(), TwoViews(), batch_size=2)
