"""Influence on a target (LESS): its scores, passes, parameters, and what it refuses."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_grad.callbacks import LoRA, OptimizerSwap
from lightning_grad.callbacks.data_pruning import _influence, _pictures, _report
from lightning_grad.testing import on_ranks
from tests.callbacks.data_pruning.test_data_pruning import SAMPLES, Classifier, make_data, train
from tests.callbacks.data_pruning.test_rows import pruning

TARGET = Subset(make_data(30), range(SAMPLES, 30))


def target(trainer: pl.Trainer) -> Any:
    return DataLoader(TARGET, batch_size=3)


class Adaptive(Classifier):
    """Trains with Adam, at a rate that falls."""

    def __init__(self, make: Callable[..., Any] = torch.optim.Adam, rate: float = 0.05) -> None:
        super().__init__()
        self.make, self.rate = make, rate

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters(), lr=self.rate)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class ByHand(pl.Callback):
    """Takes a step on each sample alone, with a copy of the optimizer, at the start of each epoch."""

    def __init__(self, include: str = "") -> None:
        self.include = include
        self.cosines: dict[int, Tensor] = {}
        self.plain: dict[int, Tensor] = {}
        self.rates: dict[int, float] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        module, optimizer = copy.deepcopy((pl_module, trainer.optimizers[0]))
        module.eval()
        own = {name: p for name, p in module.named_parameters() if name.startswith(self.include)}
        x, y, _ = make_data().tensors
        tx, ty, _ = next(iter(DataLoader(TARGET, len(TARGET))))
        aim = flat(torch.autograd.grad(F.cross_entropy(module(tx), ty), list(own.values())))
        rate = float(optimizer.param_groups[0]["lr"])
        found, plain = [], []
        for index in range(SAMPLES):
            alone, stepped = copy.deepcopy((module, optimizer))
            stepped.zero_grad()
            F.cross_entropy(alone(x[index : index + 1]), y[index : index + 1]).backward()
            changed = [p for name, p in alone.named_parameters() if name in own]
            before = [p.detach().clone() for p in changed]
            plain.append(F.cosine_similarity(flat([p.grad for p in changed]), aim, dim=0))
            stepped.step()
            move = [old - p.detach() for old, p in zip(before, changed, strict=True)]
            found.append(F.cosine_similarity(flat(move), aim, dim=0))
        epoch = trainer.current_epoch
        self.cosines[epoch], self.plain[epoch], self.rates[epoch] = torch.stack(found), torch.stack(plain), rate

    def score(self, epochs: list[int]) -> Tensor:
        rates = torch.tensor([self.rates[epoch] for epoch in epochs])
        cosines = torch.stack([self.cosines[epoch] for epoch in epochs])
        return (rates[:, None] * cosines).sum(0).div(rates.sum()).double()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def less(**arguments: Any) -> Any:
    return pruning("less", **{"target": target, "epoch": 3, "checkpoints": 2, "prune": 0.0, **arguments})


def scored(callback: Any, module: Any = None, **arguments: Any) -> Tensor:
    train(callback, Adaptive() if module is None else module, epochs=4, **arguments)
    values: Tensor = callback.scored.values
    return values


@pytest.mark.parametrize("include", ["", "head"])
def test_scores_are_those_of_steps_on_single_samples(include: str) -> None:
    hand = ByHand(include)
    values = scored(less(include=[include] if include else None), more=[hand])
    torch.testing.assert_close(values, hand.score([2, 3]), atol=2e-5, rtol=1e-4)  # differences of weights round to 1e-6
    assert (values - hand.plain[3]).abs().max() > 0.1, "gradients in place of Adam's steps are something else"
    assert (values - hand.cosines[3]).abs().max() > 1e-3, "one pass is something else"


def test_sgd_has_the_directions_of_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(_influence, "rank_zero_info", said.append)
    hand = ByHand()
    values = scored(less(checkpoints=1), Classifier(), more=[hand])
    torch.testing.assert_close(values, hand.plain[3].double(), atol=1e-6, rtol=1e-4)
    assert said == [
        "DataPruning compares the gradients of 6 parameters, because SGD has no moments like Adam's so far, with the "
        "gradient of the target."
    ]


def test_projected_scores_are_close() -> None:
    exact, projected = scored(less()), scored(less(projection=8192))
    assert (exact - projected).abs().max() < 3 * (2 / 8192) ** 0.5
    assert not torch.equal(exact, projected)


def test_duplicates_of_the_target_rank_first() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(400, 6, generator=generator), torch.randint(3, (400,), generator=generator)
    copies = [7, 100, 201, 333]  # 1 % of the samples
    x[:, 3:] = 0.0  # the copies are of another domain, with features of its own
    x[copies], y[copies] = torch.tensor([0, 0, 0, 2.0, -1.0, 3.0]) + 0.3 * torch.randn(4, 6, generator=generator), 1
    data = TensorDataset(x, y, torch.arange(400))
    ranks = {}
    for score in ("less", "grand"):
        more = {"target": lambda _: Subset(data, copies)} if score == "less" else {}
        callback = pruning(score, prune=0.0, epoch=1, **more)
        train(callback, Adaptive(), dataset=data, batch_size=50)
        ranks[score] = set(callback.scored.values.topk(4).indices.tolist())
    assert ranks["less"] == set(copies)
    assert ranks["grand"] != set(copies), "they do not stand out as such"


def test_a_sample_counts_for_the_target_that_it_helps_most() -> None:
    halves = [Subset(TARGET, range(4)), Subset(TARGET, range(4, len(TARGET)))]
    alone = torch.stack([scored(less(target=lambda _, half=half: half)) for half in halves])
    together = scored(less(target=lambda _: {"one": halves[0], "other": halves[1]}))
    torch.testing.assert_close(together, alone.amax(0), atol=1e-6, rtol=1e-5)
    assert (together - scored(less())).abs().max() > 0.01, "the mean gradient of both is something else"


def test_single_samples_and_functions_have_the_same_scores() -> None:
    batch = scored(less(checkpoints=1))
    torch.testing.assert_close(scored(less(checkpoints=1, scores_by="sample")), batch, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scored(less(checkpoints=1, loss_fn=losses)), batch, atol=1e-5, rtol=1e-4)


def losses(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def test_passes_at_rate_zero_have_a_mean() -> None:
    values = scored(less(), Adaptive(rate=0.0))
    assert values.abs().max() > 0.01
    assert not values.isnan().any()


def names(monkeypatch: pytest.MonkeyPatch, callback: Any, module: Any, **arguments: Any) -> tuple[set[str], set[str]]:
    """Which parameters are compared, and for which of them Adam's moments are used, in the last pass."""
    seen: list[tuple[set[str], set[str]]] = []
    inner = _influence._moments

    def see(trainer: Any, parameters: Any) -> Any:
        found = inner(trainer, parameters)
        seen.append((set(parameters), set(found)))
        return found

    monkeypatch.setattr(_influence, "_moments", see)
    scored(callback, module, **arguments)
    return seen[-1]


def test_adapters_alone_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoRA(rank=2, include=["body"], also_train=["head"])
    compared, adam = names(monkeypatch, less(checkpoints=1), Adaptive(), more=[lora])
    assert len(compared) == 2
    assert all(name.startswith("body.0.") for name in compared)
    assert adam == compared
    again, _ = names(monkeypatch, less(checkpoints=1, include=["head"]), Adaptive(), more=[copy.deepcopy(lora)])
    assert again == {"head.weight", "head.bias"}


@pytest.mark.parametrize(("optimizer", "uses"), [("adamw", True), ("lion", False), ("soap", False)])
def test_only_moments_like_those_of_adam_are_used(optimizer: str, uses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = OptimizerSwap(optimizer, lr_factor=1.0, wd_factor=1.0)
    compared, adam = names(monkeypatch, less(checkpoints=1), Adaptive(), more=[swap])
    assert adam == (compared if uses else set())


def test_label_errors_begin_with_the_least_influential() -> None:
    callback = less(checkpoints=1)
    values = scored(callback)
    wrong = callback.scored.label_errors
    assert len(wrong) > 2
    assert values[wrong].tolist() == sorted(values[wrong].tolist())


def test_the_influential_are_kept(recwarn: pytest.WarningsRecorder) -> None:
    callback = less(prune=0.7, checkpoints=1)
    values = scored(callback)
    kept = callback.scored.kept
    assert values[kept].min() >= values.topk(len(kept)).values[-1]
    assert not [each for each in recwarn if "hardest" in str(each.message)]


def scored_on_ranks() -> Any:
    callback = less(checkpoints=1, epoch=1)
    module = Classifier(normalizes=False)
    module.learning_rate = 0.0
    train(callback, module, strategy="ddp", devices=2, use_distributed_sampler=True)
    return callback.scored.values


def test_two_ranks_have_the_scores_of_one() -> None:
    module = Classifier(normalizes=False)
    module.learning_rate = 0.0
    alone = less(checkpoints=1, epoch=1)
    train(alone, module)
    for values in on_ranks(2, scored_on_ranks):
        torch.testing.assert_close(values, alone.scored.values, atol=1e-6, rtol=1e-4)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"score": "el2n", "target": target}, "target works only with score='less'"),
    ({"score": "grand", "include": ["head"]}, "include works only with score='less'"),
    ({"keep": "random", "target": target}, "target works only with score='less' that ranks the samples"),
    ({"score_files": ["a.npz"], "score": "el2n", "projection": 64}, "projection works only with"),
    ({"score": "less", "projection": 100}, "dim must be a positive multiple of 64; got 100"),
    ({"score": "less", "offset": 0.1}, "the most influential ones"),
    ({"score": "vog", "epoch": 3, "checkpoints": 1}, "checkpoints must be at least 2 with score='vog'"),
    ({"score": "less", "checkpoints": 0}, "checkpoints must be at least 1"),
    ({"select": "dq", "target": target}, "so target has no effect"),
    ({"select": "dq", "score": "less"}, "so score has no effect"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_settings_that_contradict_each_other(case: int) -> None:
    arguments, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        pruning(**arguments)


class Batches(pl.Callback):
    count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1


def other_form(trainer: pl.Trainer) -> Any:
    return TensorDataset(torch.zeros(4, 6), torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))


def no_gradient(trainer: pl.Trainer) -> Any:
    return TensorDataset(torch.zeros(1, 6), torch.full((1,), -100), torch.zeros(1, dtype=torch.long))


def test_a_target_of_another_form_is_refused_before_the_first_batch() -> None:
    spy = Batches()
    with pytest.raises(ValueError, match=r"batch\[1\] is a 2-dimensional floating-point tensor in the target"):
        scored(less(target=other_form), more=[spy])
    assert spy.count == 0


def test_a_target_without_a_gradient_is_refused_after_the_first_batch() -> None:
    spy = Batches()
    with pytest.raises(ValueError, match=r"the gradient of the target, but it is (zero|not finite)"):
        scored(less(target=no_gradient), more=[spy])
    assert spy.count <= 1


def test_a_mapping_is_no_target() -> None:
    with pytest.raises(TypeError, match="reads the samples of its target by index, but the target is dict"):
        scored(less(target=lambda _: {"train": [1, 2]}))


class Hinge(Adaptive):
    """Has no loss on samples that are far on their side, as those with 9 in the first feature."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, _ = batch
        return (F.cross_entropy(self(x), y, reduction="none") * (x[:, 0] < 9)).mean()


def test_a_target_whose_first_batch_has_no_gradient() -> None:
    x, y, index = next(iter(DataLoader(TARGET, len(TARGET))))
    x = x.clone()
    x[:3, 0] = 9.0
    part = TensorDataset(x[3:], y[3:], index[3:])
    whole = TensorDataset(x, y, index)
    mixed, rest = (scored(less(target=lambda _, aim=aim: DataLoader(aim, 3)), Hinge()) for aim in (whole, part))
    torch.testing.assert_close(mixed, rest, atol=1e-6, rtol=1e-5)


def test_samples_without_a_finite_step_have_no_score() -> None:
    class Odd(Adaptive):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if self.training else loss + self.root(batch[0]).mean()

        def root(self, x: Tensor) -> Tensor:  # its value is 0, but has no slope where the first feature is the largest
            top = x[:, 0] == make_data().tensors[0][:, 0].max()
            return (self.head.bias[0] * 0.0 * torch.ones(len(x)) + (~top).float()).sqrt() - (~top).float()

    odd = int(make_data().tensors[0][:, 0].argmax())
    for scores_by in ("batch", "sample"):
        values = scored(less(checkpoints=1, scores_by=scores_by), Odd())
        assert values.isnan().nonzero().flatten().tolist() == [odd], scores_by


def test_complex_parameters_are_refused_unless_others_are_included() -> None:
    class Complex(Adaptive):
        def __init__(self) -> None:
            super().__init__()
            self.phase = torch.nn.Parameter(torch.ones(8, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.body(x) * self.phase).real)

    spy = Batches()
    with pytest.raises(ValueError, match="compares real gradients, but phase is complex"):
        scored(less(), Complex(), more=[spy])
    assert spy.count == 0
    assert scored(less(include=["head"]), Complex()).isfinite().all()


def test_an_optimizer_that_has_not_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(_influence, "rank_zero_info", said.append)
    with pytest.warns(UserWarning, match="scores at initialization"):
        scored(less(checkpoints=1, epoch=0))
    assert "because Adam has no moments like Adam's so far" in said[0]


def test_parameters_that_no_optimizer_holds() -> None:
    class Half(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.body.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"no optimizer holds the parameters that include=\['head'\] selects"):
        scored(less(include=["head"]), Half())


def test_figures_speak_of_influence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    inner = _pictures.draw_samples

    def draw(*args: Any) -> Any:
        figure = inner(*args)
        drawn.extend(text.get_text() for text in figure.texts)
        return figure

    monkeypatch.setattr(_report, "draw_samples", draw)
    callback = less(checkpoints=1, epoch=1, num_shown=4, figure=True, decode=lambda item: torch.rand(3, 8, 8))
    train(callback, Classifier(), logger=CSVLogger(tmp_path))
    assert "The most influential samples (4), most influential first" in drawn
    assert "more influential" in _pictures.draw_scores(callback.scored, "", None).axes[0].get_xlabel()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_round_between_two_passes_knows_the_classes(tmp_path: Path) -> None:
    given = {"epoch": 6, "checkpoints": 2, "prune": 0.3, "balance": "class"}
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    train(less(**given), Adaptive(), epochs=7, more=[saving], enable_checkpointing=True)
    earlier = less(**{**given, "epoch": 4})
    train(earlier, Adaptive(), epochs=6, ckpt=tmp_path / "epoch=4.ckpt")  # with one pass, of epoch 3
    assert earlier.scored.epoch == 5
    assert earlier.scored.labels is not None


def test_score_files_of_influence(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = str(tmp_path / "less.npz")
    train(less(checkpoints=1, epoch=1, save_scores=path), Adaptive())
    train(pruning(score_files=[path], prune=0.7, epoch=0))
    assert not [each for each in recwarn if "hardest" in str(each.message)]
    with pytest.raises(ValueError, match="the most influential ones"):
        train(pruning(score_files=[path], prune=0.7, offset=0.1, epoch=0))


def test_a_changed_target_scores_again(tmp_path: Path) -> None:
    def half(trainer: pl.Trainer) -> Any:
        return Subset(TARGET, range(3))

    found = train(less(epoch=1, checkpoints=1, prune=0.3), Adaptive(), epochs=2)
    found.trainer.save_checkpoint(tmp_path / "run.ckpt")
    same, other = (less(epoch=1, checkpoints=1, prune=0.3, target=aim) for aim in (target, half))
    for callback, epoch in ((same, 1), (other, 2)):
        train(callback, Adaptive(), epochs=3, ckpt=tmp_path / "run.ckpt")
        assert callback.scored.epoch == epoch
