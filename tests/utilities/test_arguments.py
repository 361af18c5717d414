"""Arguments are checked against their annotations, and settings are compared on resume."""

import copy
import functools
import inspect
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml

from lightning_grad.core.callback import GradCallback
from lightning_grad.testing import fit, loaders, make_trainer
from lightning_grad.utilities.arguments import CheckedArguments, check_kind, follow_settings, plain

# A checkpoint is resumed without the callback that wrote it.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, bool),
        (3, int),
        (3, float),
        (0.5, float),
        (math.inf, float),
        (np.float64(0.5), float),
        ("a", str),
        (None, str | None),
        ("sum", Literal["sum", "mean"]),
        (["a", "b"], Sequence[str]),
        (("a",), Sequence[str]),
        ([], Sequence[str]),
        ([[0.0, "2:4"], (1, "1:4")], Sequence[tuple[float, str]]),
        ({"a": 1}, float | Mapping[str, float]),
        (2.0, float | Mapping[str, float]),
        (len, Callable[[Any], int]),
        (timedelta(1), timedelta | None),
        (object(), Any),
    ],
)
def test_values_of_the_kind_pass(value, kind):
    check_kind(value, kind, "argument")


@pytest.mark.parametrize(
    ("value", "kind", "error", "words"),
    [
        ("no", bool, TypeError, "must be True or False; got 'no'. In YAML, write it without quotes."),
        (1, bool, TypeError, "must be True or False; got 1."),
        (True, int, TypeError, "must be an integer; got True."),
        (2.0, int, TypeError, "must be an integer; got 2.0."),
        (np.int64(2), int, TypeError, "must be an integer; got "),
        (True, float, TypeError, "must be a number; got True."),
        (math.nan, float | None, ValueError, "must be a number or None; got nan."),
        ("1e-3", float, TypeError, "must be a number; got '1e-3'. In YAML, write 0.001 without quotes."),
        ("1e-5", float, TypeError, "must be a number; got '1e-5'. In YAML, write 1.0e-05 without quotes."),
        ("inf", float, TypeError, "must be a number; got 'inf'. In YAML, write .inf without quotes."),
        ("4", int, TypeError, "must be an integer; got '4'. In YAML, write 4 without quotes."),
        (10**400, float, TypeError, "must be a number; got 1000"),
        (124, str, TypeError, "must be a string; got 124. In YAML, write it in quotes."),
        ("a", Sequence[str], TypeError, "must be a list of strings; got 'a'. Write ['a']."),
        (b"a", Sequence[int], TypeError, "must be a list of integers; got b'a'."),
        ([3], Sequence[str], TypeError, "must be a list of strings; got [3]. In YAML, write it in quotes."),
        (
            ["0"],
            Sequence[int] | None,
            TypeError,
            "must be a list of integers or None; got ['0']. In YAML, write 0 without",
        ),
        ({"a": 124}, str | Mapping[str, str], TypeError, "In YAML, write it in quotes."),
        ({1: 0.5}, Mapping[str, float], TypeError, "must be a mapping from strings to numbers; got {1: 0.5}."),
        ([[0.0]], Sequence[tuple[float, str]], TypeError, "must be a list of [a number, a string]; got [[0.0]]."),
        ("sun", Literal["sum", "mean"], ValueError, "argument must be 'sum' or 'mean'; got 'sun'. Did you mean 'sum'?"),
        (3, Literal["sum", "mean"] | None, TypeError, "must be one of 'sum', 'mean' or None; got 3."),
        ("package.score", Callable[[Any], int], TypeError, "must be a function; got 'package.score'."),
        (30, timedelta | None, TypeError, "must be a timedelta or None; got 30."),
    ],
)
def test_values_of_another_kind_raise_in_words(value, kind, error, words):
    with pytest.raises(error) as refusal:
        check_kind(value, kind, "argument")
    assert words in str(refusal.value)


def test_a_tuple_for_a_string_gets_no_advice_for_the_values_of_a_mapping():
    with pytest.raises(TypeError, match=r"mapping from strings to strings; got \(2, 4\)\.$"):
        check_kind((2, 4), str | Mapping[str, str], "argument")


class Base(CheckedArguments):
    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate


class Derived(Base):
    def __init__(self, count: int, rate: float = 0.1, *rest: int, flag: bool = False, **others: str) -> None:
        self.ran = True
        super().__init__(rate)


def test_the_constructor_does_not_run_on_a_wrong_argument():
    made = Derived.__new__(Derived)
    with pytest.raises(TypeError, match="flag must be True or False"):
        made.__init__(1, flag="yes")
    assert not hasattr(made, "ran")


def test_positional_and_inherited_arguments_are_checked_too():
    with pytest.raises(TypeError, match="count must be an integer"):
        Derived(1.5)
    with pytest.raises(TypeError, match="rate must be a number"):
        Base("fast")

    class Silent(Base):
        pass

    with pytest.raises(TypeError, match="rate must be a number"):
        Silent(rate="fast")


def test_what_is_variadic_is_left_alone_and_python_says_what_is_missing():
    Derived(1, 0.5, "rest", other=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'count'"):
        Derived()
    with pytest.raises(TypeError, match="got multiple values for argument 'count'"):
        Derived(1, count=2)


def test_the_signature_and_copies_are_those_of_the_plain_class():
    assert list(inspect.signature(Derived).parameters) == ["count", "rate", "rest", "flag", "others"]
    assert pickle.loads(pickle.dumps(Base(0.5))).rate == copy.deepcopy(Base(0.5)).rate == 0.5


def test_an_annotation_that_cannot_be_evaluated_is_not_checked():
    class Odd(CheckedArguments):
        def __init__(self, value: "NoSuchName") -> None:  # type: ignore[name-defined]  # noqa: F821
            self.value = value

    assert Odd("anything").value == "anything"


def test_plain_settings_load_safely(tmp_path):
    odd = {
        "count": True,
        "rate": np.float64(0.5),
        "sizes": (1, 2),
        "by_name": {"*": 1},
        "score_fn": math.sqrt,
        "device": torch.device("cpu"),
    }
    torch.save(plain(odd), tmp_path / "settings.pt")
    loaded = torch.load(tmp_path / "settings.pt", weights_only=True)
    assert loaded == {
        "count": True,
        "rate": 0.5,
        "sizes": [1, 2],
        "by_name": {"*": 1},
        "score_fn": "math.sqrt",
        "device": "device(type='cpu')",
    }


def test_settings_of_the_same_kind_of_object_are_alike_in_every_process():
    class Scorer:
        def __call__(self) -> None: ...

    assert plain(Scorer()) == plain(Scorer())
    assert plain(functools.partial(max, Scorer())) == plain(functools.partial(max, Scorer()))


def test_settings_that_the_checkpoint_lacks_are_not_compared(caplog):
    caplog.set_level("INFO")
    follow_settings("Technique", {}, {"rate": 1.0}, {"rate": "it is fixed"})
    follow_settings("Technique", {"gone": 1}, {"rate": 1.0}, {"gone": "it is fixed"})
    assert not caplog.records


class Damped(GradCallback):
    """A technique with a setting that may change on resume and one that may not."""

    namespace = "damped"
    fixed_settings: ClassVar[Mapping[str, str]] = {"size": "its buffer has that length"}

    def __init__(self, rate: float = 0.5, size: int = 4, name: str | None = None) -> None:
        super().__init__(name)
        self.rate = rate
        self.size = size


@pytest.fixture
def checkpoint(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="first")
    fit([Damped(), saving], max_epochs=1)
    return tmp_path / "first.ckpt"


def test_a_changed_setting_is_followed_and_said(checkpoint, caplog):
    caplog.set_level("INFO")
    callback = Damped(rate=0.25)
    fit([callback], ckpt=checkpoint, max_epochs=2)
    assert callback.rate == 0.25
    assert "Damped resumes with changed settings: rate=0.25 (was 0.5)." in caplog.text


def test_the_same_settings_are_resumed_in_silence(checkpoint, caplog):
    caplog.set_level("INFO")
    fit([Damped()], ckpt=checkpoint, max_epochs=2)
    assert "changed settings" not in caplog.text


def test_a_fixed_setting_refuses_before_anything_is_trained(checkpoint):
    words = (
        r"Damped cannot resume with size=8: .* written with size=4, .* its buffer has that length. Set size=4, or start"
    )
    with pytest.raises(ValueError, match=words):
        fit([Damped(size=8)], ckpt=checkpoint, max_epochs=2)


def test_the_ways_out_of_a_fixed_setting_work(checkpoint):
    fit([Damped(size=4)], ckpt=checkpoint, max_epochs=2)
    trainer, module = fit([Damped(size=4)], max_epochs=1)
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    trainer, _ = fit([Damped(size=8)], module, max_epochs=2)
    assert trainer.current_epoch == 2


def test_evaluation_of_a_checkpoint_compares_nothing(checkpoint):
    _, module = fit([Damped()], max_epochs=1)
    make_trainer(callbacks=[Damped(size=8)]).validate(module, loaders()[1], ckpt_path=checkpoint, verbose=False)


@pytest.mark.parametrize("text", ["1e-3", "1e-5", "2.5e-7", "1e30", "1E5", "-1e-9", "3", "0.5", "inf"])
def test_a_number_that_yaml_took_for_text_is_written_as_advised(text):
    with pytest.raises(TypeError, match="In YAML, write") as refused:
        check_kind(text, float, "argument")
    advised = str(refused.value).partition("In YAML, write ")[2].partition(" without quotes")[0]
    read = yaml.safe_load(f"argument: {advised}")["argument"]
    assert read == float(text)
    check_kind(read, float, "argument")


def test_text_that_is_no_number_gets_no_advice_about_quotes():
    with pytest.raises(TypeError, match=r"must be a number; got 'never'\.$"):
        check_kind("never", float, "argument")
