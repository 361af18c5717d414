"""A term that a step adds when its time comes is noticed, weighted from then on, or refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_grad.callbacks import InfoBatch, LossReweighting
from lightning_grad.functional import InseparableLossError
from tests.callbacks.data_pruning.test_data_pruning import CLASSES, Classifier, train


class Growing(Classifier):
    """One call of a loss in the first epoch, and one more term later."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss + self.more(logits, batch) if self.current_epoch else loss

    def more(self, logits: Tensor, batch: Any) -> Tensor:
        return 0.5 * logits.square().mean()


class Decaying(Growing):
    def more(self, logits: Tensor, batch: Any) -> Tensor:
        return 1e-3 * sum(p.square().sum() for p in self.parameters())


class Mixing(Growing):
    def more(self, logits: Tensor, batch: Any) -> Tensor:
        return (logits - F.one_hot(batch[1], CLASSES)).square().mean().sqrt()


class Alternating(Growing):
    """Adds what belongs to no sample in every other step from the first epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss + Decaying.more(self, logits, batch) if batch_idx % 2 else loss


def callback_of(kind: str) -> Any:
    if kind == "info":
        return InfoBatch(0.5, prune_until=1.0)
    return LossReweighting(temperature=0.5, start_temperature=0.5, warmup_fraction=0.0)


def losses_seen(callback: Any, module: Any) -> tuple[list[bool], list[Any]]:
    """Return for each step of three epochs whether its loss was taken term by term, and the losses."""
    by_terms: list[bool] = []
    seen: list[Any] = []
    weigh = callback._weigh

    def spy(losses: Any) -> Any:
        by_terms.append(losses.terms is not None)
        seen.append(losses.losses.detach())
        return weigh(losses)

    callback._weigh = spy
    train(callback, module, epochs=3)
    return by_terms, seen


@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_it_is_weighted_from_the_next_step_on(kind: str) -> None:
    with pytest.warns(UserWarning, match="In the previous step only that call was weighted; from this step on") as told:
        by_terms, _ = losses_seen(callback_of(kind), Growing(normalizes=False))
    assert by_terms[:4] == [False] * 4  # three batches, and the one that tells
    assert all(by_terms[4:])
    assert len([warning for warning in told if "In the previous step" in str(warning.message)]) == 1


@pytest.mark.parametrize("module", [Decaying])
@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_what_belongs_to_no_sample_changes_nothing(kind: str, module: Any) -> None:
    by_terms, _ = losses_seen(callback_of(kind), module())  # a warning would be an error
    assert not any(by_terms)


@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_steps_of_which_some_were_not_looked_at_are_told_once(kind: str) -> None:
    with pytest.warns(
        UserWarning, match="in some steps training_step returns more .* only that call is weighted"
    ) as told:
        by_terms, _ = losses_seen(callback_of(kind), Alternating())
    assert not any(by_terms)
    assert len([warning for warning in told if "in some steps" in str(warning.message)]) == 1


@pytest.mark.parametrize("kind", ["info", "reweighting"])
def test_what_mixes_the_samples_is_refused_when_it_comes(kind: str) -> None:
    with pytest.raises(InseparableLossError, match=r"sqrt \(test_terms_that_come_later.py:\d+\) mixes the samples"):
        train(callback_of(kind), Mixing(), epochs=3)


@pytest.mark.filterwarnings("ignore:.*in some steps training_step returns more")
def test_the_look_at_it_changes_no_bit() -> None:
    class Neutral(InfoBatch):
        def _weigh(self, losses: Any) -> Tensor:
            return torch.ones_like(losses.losses)

    found = train(Neutral(0.5, prune_until=0.0), Alternating(), epochs=3).module
    expected = train(InfoBatch(0.0), Alternating(), epochs=3).module
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_several_ranks_are_told_only() -> None:
    """No rank runs the step once more, as another one may not have to."""
    arguments = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    # In the processes of the ranks a warning is an error.
    with pytest.raises(Exception, match=r"in some steps training_step returns more .* only that call is weighted"):
        train(callback_of("reweighting"), Growing(normalizes=False), epochs=3, **arguments)
