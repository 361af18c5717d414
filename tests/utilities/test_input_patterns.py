"""The inputs of a batch that is a list: of tensors, of samples, or of batches, which is told by what stands beside them."""

from typing import Any

import pytest
import torch

from lightning_grad.utilities.batches import EVERY, find_input, text_of
from lightning_grad.utilities.input_patterns import are_samples, expanded, find_inputs, has_inputs, neighbours

ALL = EVERY
IMAGES = [torch.zeros(3, 8, 8 + number) for number in range(4)]
SAME = [torch.zeros(3, 8, 8) for _ in range(4)]
VIEWS = [torch.zeros(8, 3, 6, 6), torch.zeros(8, 3, 6, 6)]
BOXES = [{"boxes": torch.zeros(count, 4), "labels": torch.zeros(count)} for count in (2, 5, 3, 1)]


@pytest.mark.parametrize(
    ("batch", "pattern", "samples"),
    [
        pytest.param((SAME, list(range(4))), (0, ALL), True, id="images and numbers"),
        pytest.param((tuple(IMAGES), tuple(BOXES)), (0, ALL), True, id="images and boxes"),
        pytest.param({"images": IMAGES, "labels": torch.zeros(4)}, ("images", ALL), True, id="a tensor of labels"),
        pytest.param({"images": IMAGES, "names": ["a"] * 4}, ("images", ALL), True, id="names"),
        pytest.param(list(zip(IMAGES, range(4), strict=True)), (ALL, 0), True, id="samples with numbers"),
        pytest.param([{"image": x, **b} for x, b in zip(SAME, BOXES, strict=True)], (ALL, "image"), True, id="dicts"),
        pytest.param([(x, torch.tensor(1)) for x in SAME], (ALL, 0), True, id="samples with scalars"),
        pytest.param([{"x": {"image": x}, "id": "a"} for x in SAME], (ALL, "x", "image"), True, id="nested"),
        pytest.param((SAME[:3], torch.zeros(3)), (0, ALL), True, id="as many images as channels"),
        pytest.param(([torch.zeros(1, 8, 8)], torch.zeros(1)), (0, ALL), True, id="a single grey image"),
        pytest.param(([IMAGES[0]], [3]), (0, ALL), True, id="a single image"),
        # Not lists of samples.
        pytest.param([torch.zeros(8, 3), torch.zeros(8, 2)], (0,), False, id="input and target"),
        pytest.param([torch.zeros(8, 3), torch.zeros(8, 3)], (0,), False, id="an autoencoder's"),
        pytest.param((VIEWS, torch.zeros(8)), (0, 0), False, id="two views"),
        pytest.param((VIEWS, [torch.zeros(8), torch.zeros(8)]), (0, 0), False, id="two views, two labels"),
        pytest.param((VIEWS * 4, torch.zeros(8)), (0, 0), False, id="as many views as samples"),
        pytest.param({"views": VIEWS}, ("views", 0), False, id="two views alone"),
        pytest.param([[torch.zeros(8, 3), torch.zeros(8)]] * 2, (0, 0), False, id="two loaders"),
        pytest.param([[torch.zeros(8, 3), torch.zeros(8)], [torch.zeros(4, 3)]], (0, 0), False, id="one unlabelled"),
        pytest.param([torch.zeros(8, 3)], (0,), False, id="a data set of inputs"),
        pytest.param(SAME, (0,), False, id="images alone"),
        pytest.param(([*SAME[:2], torch.zeros(3, 8)], [1, 2, 3]), (0, 0), False, id="of several dimensions"),
        pytest.param({"a": {"x": torch.zeros(4, 2)}, "b": torch.zeros(4)}, ("a", "x"), False, id="no list"),
    ],
)
def test_samples_are_told_from_batches(batch: Any, pattern: Any, samples: bool) -> None:
    found = find_inputs(batch, None, "Somebody")
    assert found == pattern
    assert are_samples(batch, pattern) is samples
    assert has_inputs(batch, pattern)


@pytest.mark.parametrize(
    ("batch", "key", "paths"),
    [
        ((VIEWS, torch.zeros(8)), "0.*", [(0, 0), (0, 1)]),
        ((VIEWS, torch.zeros(8)), 0, [(0, 0), (0, 1)]),
        ((VIEWS, torch.zeros(8)), "0", [(0, 0), (0, 1)]),
        ({"views": VIEWS}, "views", [("views", 0), ("views", 1)]),
        ({"views": VIEWS}, "views.1", [("views", 1)]),
        (SAME, "*", [(0,), (1,), (2,), (3,)]),
        ([[torch.zeros(8, 3), torch.zeros(8)]] * 2, "*.0", [(0, 0), (1, 0)]),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(2, 3)}, "*", [("a",), ("b",)]),
        ({"*": torch.zeros(2, 2), "b": torch.zeros(2)}, "*", [("*",)]),
        ([[SAME[0], "a"], [SAME[1], "b"]], "*.0", [(0, 0), (1, 0)]),
    ],
)
def test_a_key_may_mean_several(batch: Any, key: Any, paths: Any) -> None:
    found = find_inputs(batch, key, "Somebody")
    assert found is not None
    assert expanded(batch, found) == paths


@pytest.mark.parametrize(
    ("batch", "key", "said"),
    [
        ({"x": VIEWS}, "z.*", r"Somebody: input_key='z\.\*' is not in the batch; available there: 'x'\."),
        ({"x": []}, "x.*", r"input_key='x\.\*' is not in the batch; type list has no parts\."),
        (
            (SAME[0], torch.zeros(3)),
            "*",
            r"floating-point tensors of one dtype and number of dimensions; the tensors at batch\[\*\] differ",
        ),
        ((SAME[0], torch.zeros(3, 1, 1).long()), "*", r"batch\[\*\] differ\. Select one of them\."),
        (([SAME[0], SAME[0].double()], 1), 0, r"batch\[0\]\[\*\] differ"),
        ({"x": [torch.zeros(2).long()]}, "x", r"must name a floating-point tensor of the batch, but names a list\."),
    ],
)
def test_keys_that_cannot_mean_several(batch: Any, key: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_inputs(batch, key, "Somebody")


@pytest.mark.parametrize("batch", [[[]], [None], [[SAME[0], None]], [[SAME[0], SAME[0].double()]], {"x": SAME}])
def test_later_batches_of_another_form(batch: Any) -> None:
    assert not has_inputs(batch, (0, EVERY))


def test_others_like_the_input_are_named() -> None:
    assert neighbours((VIEWS, torch.zeros(8)), (0, 0)) == (0, EVERY)
    assert neighbours(SAME, (0,)) == (EVERY,)
    assert neighbours([SAME[0], SAME[1]], (0,)) is None, "the second of two is the target"
    assert neighbours({"a": SAME[0], "b": SAME[1]}, ("a",)) is None
    assert neighbours((SAME, [1] * 4), (0, EVERY)) is None
    assert text_of((0, EVERY, "x")) == "batch[0][*]['x']"


def test_an_empty_tensor_is_not_meant() -> None:
    none, x = torch.zeros(0, 3, dtype=torch.long), torch.zeros(2, 3)
    assert find_input((none, x), None, "Somebody") == (1,)
    assert find_input((torch.zeros(2, 0), x), None, "Somebody") == (1,)
    assert find_input({"ids": none, "y": x}, None, "Somebody") is None
    assert find_input((none, torch.zeros(0, 3)), None, "Somebody") == (1,), "a batch without samples"
    assert find_input((torch.ones(2, 3, dtype=torch.long), x), None, "Somebody") is None
