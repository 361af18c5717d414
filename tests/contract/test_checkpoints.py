"""G4: the state of a technique is made of plain types."""

from typing import Any

import pytest
import torch

from tests.contract.recorded import watched
from tests.contract.settings import TECHNIQUES


def _assert_plain(value: Any) -> None:
    assert isinstance(value, (torch.Tensor, int, float, str, bool, list, dict, type(None))), type(value)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _assert_plain(item)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_callback_state_is_made_of_plain_types(technique: Any) -> None:
    callback = technique.build()
    for path in watched(technique).saved("epochs").values():
        checkpoint = torch.load(path, weights_only=False)  # three times as fast; a check of G4 loads it by default
        if callback.state_dict():
            _assert_plain(checkpoint["callbacks"][callback.state_key])
