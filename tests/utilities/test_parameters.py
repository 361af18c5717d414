"""Parameters are chosen by the names that users know."""

import pytest
import torch
from torch import nn

from lightning_grad.utilities.parameters import (
    all_names,
    check_patterns,
    clean_name,
    first_match,
    matches,
    named_owners,
)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("net.0.weight", "net.0.weight"),
        ("_orig_mod.net.0.weight", "net.0.weight"),
        ("net._orig_mod.0.weight", "net.0.weight"),
        ("a._orig_mod.b._orig_mod.weight", "a.b.weight"),
        ("orig_mod.weight", "orig_mod.weight"),
    ],
)
def test_names_lose_the_prefix_of_compiled_modules(name: str, clean: str) -> None:
    assert clean_name(name) == clean


@pytest.mark.parametrize(
    ("name", "pattern", "meant"),
    [
        ("encoder.0.linear.weight", "encoder.0.linear.weight", True),
        ("encoder.0.linear.weight", "encoder.0.linear", True),
        ("encoder.0.linear.weight", "encoder.*", True),
        ("encoder.0.linear.weight", "*.linear", True),
        ("encoder.0.linear.weight", "*.weight", True),
        ("encoder.0.linear.weight", "encoder.?.linear", True),
        ("encoder.0.linear.weight", "encoder.[01].linear", True),
        ("encoder._orig_mod.0.linear.weight", "encoder.0.linear", True),
        ("encoder.0.linear.weight", "*", True),
        ("encoder.0.linear.weight", "encoder", True),
        ("encoder.0.linear.weight", "encoder.0", True),
        ("encoder.0.linear.weight", "enc", False),
        ("encoder.0.linear.weight", "*.0", True),
        ("encoder.0.linear.weight", "encoder._orig_mod.0", True),
        ("encoder.0.linear.weight", "linear", False),
        ("encoder.0.linear.weight", "Encoder.*", False),
        ("encoder.10.linear.weight", "encoder.?.linear", False),
        ("encoder.0.linear.weight", "encoder.0.linear.bias", False),
        ("weight", "weight", True),
        ("head.weight", "headless.*", False),
    ],
)
def test_pattern_names_the_parameter_or_its_module(name: str, pattern: str, meant: bool) -> None:
    assert matches(name, [pattern]) is meant
    assert matches(name, ["something.else", pattern]) is meant


def test_no_pattern_means_nothing() -> None:
    assert not matches("weight", [])


def named_module() -> nn.Module:
    """Return a module with encoder.0.linear1.weight, encoder.0.linear2.weight and head._orig_mod.weight."""
    layer = nn.ModuleDict({f"linear{n}": nn.Linear(1, 1, bias=False) for n in (1, 2)})
    head = nn.ModuleDict({"_orig_mod": nn.Linear(1, 1, bias=False)})
    return nn.ModuleDict({"encoder": nn.ModuleList([layer]), "head": head})


@pytest.mark.parametrize("patterns", [[], ["encoder.*"], ["head"], ["head.weight", "*.linear2"]])
def test_patterns_that_name_something_pass(patterns: list[str]) -> None:
    check_patterns(named_module(), "ZClip", include=patterns)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("encoder.0.liner1", "encoder.0.linear1"),
        ("haed", "head"),
        ("haed.*", "head"),
        ("encodr", "encoder"),
        ("encoder.0.linear3.weight", "encoder.0.linear2.weight"),
    ],
)
def test_pattern_that_names_nothing_raises_with_near_names(pattern: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"named .{pattern}.\. Did you mean .*{near}"):
        check_patterns(named_module(), "ZClip", exclude=["encoder.*", pattern])


def test_pattern_near_to_nothing_is_shown_the_first_names() -> None:
    with pytest.raises(ValueError, match=r"Names that exist: encoder.0.linear1, .*head\."):
        check_patterns(named_module(), "ZClip", include=["qqqqqq"])


def test_pattern_that_names_a_module_without_parameters_says_so() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with pytest.raises(ValueError, match=r"module '1' has no parameters\. Names that exist: 0\."):
        check_patterns(module, "ZClip", include=["1"])


def test_owners_are_named_with_every_use_of_a_tied_parameter() -> None:
    module = nn.ModuleDict(
        {"embed": nn.Embedding(3, 2), "body": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 3)}
    )
    module["head"].weight = module["embed"].weight
    module.register_parameter("scale", nn.Parameter(torch.ones(1)))
    module["body"].register_parameter("absent", None)
    found = {name: (owner, attribute) for name, owner, attribute in named_owners(module)}
    expected = ["scale", "embed.weight", "body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert list(found) == expected
    assert found["scale"] == (module, "scale")
    assert found["body.0.bias"] == (module["body"][0], "bias")


def test_every_name_of_a_tied_parameter_is_known() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
            self.head.weight = self.embed.weight
            self.alias = self.head  # one module under two names
            self.own = nn.Parameter(torch.ones(2))
            self.again = self.own  # one parameter under two names of one module

    module = Tied()
    expected = ["own", "again", "embed.weight", "head.weight", "alias.weight"]
    assert [name for names in all_names(module).values() for name in names] == expected
    for name in expected[2:]:
        assert matches(all_names(module)[id(module.head.weight)], [name.partition(".")[0]])


def test_the_first_pattern_that_fits_any_name_counts() -> None:
    names = ["embed.weight", "head.weight"]
    assert first_match(names, ["head", "embed", "*"]) == "head"
    assert first_match(names, ["*", "head"]) == "*"
    assert first_match(names, ["body"]) is None
