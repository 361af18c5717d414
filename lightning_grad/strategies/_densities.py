"""Shares of entries, as users write them: one for the run, and higher ones for its beginning."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_grad.functional.communication.wire import PAPER_WARMUP, RELEASED_WARMUP

_WARMUPS = {"paper": PAPER_WARMUP, "released": RELEASED_WARMUP}


def as_ratio(value: float, parameter: str) -> float:
    """Return a share of entries.

    Raises:
        ValueError: If it is not above 0 and at most 1.
    """
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{parameter} must be a share of entries, above 0 and at most 1; got {value!r}.")
    return float(value)


def as_densities(warmup: str | Sequence[float] | None) -> list[float]:
    """Return the shares of a warm-up, given by name or as a list; ``None`` has none.

    Raises:
        ValueError: For an empty list, or a share that is none.
    """
    if isinstance(warmup, str):
        return list(_WARMUPS[warmup])
    if warmup is not None and not warmup:
        raise ValueError("warmup must have at least one share; got []. Use None for no warm-up.")
    return [as_ratio(share, f"warmup[{place}]") for place, share in enumerate(warmup or ())]
