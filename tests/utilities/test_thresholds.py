"""Thresholds are read as users write them, and each parameter finds its own."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_grad.utilities.checks import check_above
from lightning_grad.utilities.thresholds import Bucket, as_threshold, choose_buckets


def above_zero(number: float) -> None:
    check_above(number, 0.0, "max_norm")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        (1, 1.0),
        (0.5, 0.5),
        (float("inf"), float("inf")),
        ({"a": 1, "*": 2.5}, {"a": 1.0, "*": 2.5}),
    ],
)
def test_numbers_and_mappings_become_plain(given: Any, kept: Any) -> None:
    found = as_threshold(given, "max_norm", above_zero)
    assert found == kept
    numbers = found.values() if isinstance(found, dict) else [found]
    assert given is None or all(type(number) is float for number in numbers)


def test_the_order_of_the_patterns_is_kept() -> None:
    assert list(as_threshold({"z": 1.0, "a": 2.0, "*": 3.0}, "max_norm", above_zero)) == ["z", "a", "*"]


@pytest.mark.parametrize("given", ["1.0", True, [1.0], {"*": "1"}, {"*": None}, {"*": False}, torch.tensor(1.0)])
def test_what_is_no_number_raises(given: Any) -> None:
    with pytest.raises(TypeError, match="max_norm must be a number, or a mapping from name patterns to numbers; got"):
        as_threshold(given, "max_norm", above_zero)


@pytest.mark.parametrize("given", [0.0, -1, float("nan"), {"a": 1.0, "*": 0.0}])
def test_every_number_is_checked(given: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        as_threshold(given, "max_norm", above_zero)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 2)


def found(optimizer: Any, net: nn.Module, *arguments: Any, **more: Any) -> tuple[dict[str, list[str]], list[str]]:
    buckets, left_out = choose_buckets(optimizer, net, *arguments, **more)
    for bucket in buckets:
        named = dict(net.named_parameters())
        assert all(named[name] is p for name, p in zip(bucket.names, bucket.parameters, strict=True))
    return {bucket.name: bucket.names for bucket in buckets}, left_out


ALL = [f"{module}.{kind}" for module in ("encoder.0", "encoder.1", "head") for kind in ("weight", "bias")]


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_one_number_makes_one_nameless_bucket(threshold: float | None) -> None:
    net = Net()
    buckets, left_out = choose_buckets(torch.optim.SGD(net.parameters()), net, threshold, "max_norm")
    assert [(b.name, b.names, b.threshold) for b in buckets] == [("", ALL, threshold)]
    assert left_out == []


def test_the_first_pattern_that_matches_wins_and_no_match_is_left_out() -> None:
    net = Net()
    patterns = {"encoder.1.weight": 1.0, "encoder.*": 2.0, "encoder.0": 3.0}
    sorted_, left_out = found(torch.optim.SGD(net.parameters()), net, patterns)
    assert sorted_ == {
        "encoder.*": ["encoder.0.weight", "encoder.0.bias", "encoder.1.bias"],
        "encoder.1.weight": [ALL[2]],
    }
    assert left_out == ["head.weight", "head.bias"]


def test_a_group_that_carries_the_key_comes_before_patterns() -> None:
    net = Net()
    optimizer = torch.optim.SGD(
        [{"params": net.encoder.parameters(), "max_norm": 0.5}, {"params": net.head.parameters()}]
    )
    buckets, left_out = choose_buckets(optimizer, net, {"*": 1.0}, "max_norm")
    assert [(b.name, b.threshold, len(b.parameters)) for b in buckets] == [("group0", 0.5, 4), ("*", 1.0, 2)]
    assert left_out == []
    optimizer.param_groups[0]["max_norm"] = 0.25
    assert buckets[0].threshold == 0.25, "it is read when it is asked for"


def test_another_key_in_a_group_is_not_a_threshold() -> None:
    net = Net()
    optimizer = torch.optim.SGD([{"params": net.parameters(), "max_norm": 0.5}])
    assert found(optimizer, net, 1.0, "clip_value")[0] == {"": ALL}
    assert found(optimizer, net, 1.0, None)[0] == {"": ALL}


def test_an_option_of_the_optimizer_itself_is_not_a_threshold() -> None:
    class Clipping(torch.optim.SGD):
        """Has an option of the same name, which then stands in every group."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.defaults["max_norm"] = 7.0
            for group in self.param_groups:
                group["max_norm"] = 7.0

    net = Net()
    assert found(Clipping(net.parameters()), net, 1.0, "max_norm")[0] == {"": ALL}


def test_include_and_exclude_come_before_everything() -> None:
    net = Net()
    optimizer = torch.optim.SGD([{"params": net.parameters(), "max_norm": 0.5}])
    sorted_, left_out = found(optimizer, net, 1.0, "max_norm", include=["encoder.*"], exclude=["encoder.1"])
    assert sorted_ == {"group0": ALL[:2]}
    assert left_out == ALL[2:]


def test_an_empty_include_chooses_nothing() -> None:
    net = Net()
    assert found(torch.optim.SGD(net.parameters()), net, 1.0, include=[]) == ({}, ALL)


def test_names_are_those_of_the_module_without_the_prefix_of_compilation() -> None:
    net = Net()
    net.head = torch.compile(net.head, backend="eager")
    stranger = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": net.head.parameters()}, {"params": [stranger]}])
    assert [bucket.names for bucket in choose_buckets(optimizer, net)[0]] == [["head.weight", "head.bias", "group1.0"]]


def test_only_what_the_optimizer_moves_is_sorted() -> None:
    net = Net()
    assert found(torch.optim.SGD(net.head.parameters()), net, {"*": 1.0}) == ({"*": ALL[4:]}, [])


def test_a_bucket_without_a_group_has_its_value() -> None:
    assert Bucket("x", 2.0).threshold == 2.0
    assert Bucket("x").threshold is None
    assert Bucket("group0", 2.0, {"ratio": 3.0}, "ratio").threshold == 3.0


def test_a_tied_parameter_is_chosen_by_each_of_its_names() -> None:
    net = Net()
    net.tied = nn.Linear(net.head.in_features, net.head.out_features, bias=False)
    net.tied.weight = net.head.weight
    optimizer = torch.optim.SGD(net.parameters())
    for name in ("tied", "head.weight", "tied.weight"):
        (bucket,), _ = choose_buckets(optimizer, net, 1.0, include=[name])
        assert bucket.names == ["head.weight"]
        assert "head.weight" in choose_buckets(optimizer, net, 1.0, exclude=[name])[1]
        first = choose_buckets(optimizer, net, {name: 0.5, "*": 1.0})[0]
        assert {bucket.value: bucket.names for bucket in first}[0.5] == ["head.weight"]
