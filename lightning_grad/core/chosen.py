"""What a technique acts on in a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chosen:
    """What a technique acts on in this fit, as :meth:`GradCallback.chosen` returns it.

    Args:
        words: A clause without subject and full stop, as in the line that is printed when the fit begins.
        kind: What the names are: ``"parameters"``, ``"samples"``, ``"optimizers"``, ``"learning rates"``, ``"inputs"`` or
            ``"losses"``; another word, in the plural, if none of these fits.
        names: A name for each: of parameters as in ``named_parameters()``, of samples the index in the data set, as
            often as an epoch repeats it; of others the expression that leads to them, such as ``optimizers[0]``.

    Example:
        >>> chosen = Chosen("acts on 2 parameters", "parameters", ["head.weight", "head.bias"])
        >>> print(chosen)
        acts on 2 parameters: head.weight, head.bias
        >>> print(Chosen("trains on all samples", "samples", range(50_000)))
        trains on all samples: 0, 1, 2, 3, 4, ... and 49995 more
    """

    words: str
    kind: str
    names: Sequence[str | int]

    def __str__(self) -> str:
        shown = ", ".join(str(name) for name in self.names[:_SHOWN])
        more = f", ... and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        return f"{self.words}: {shown}{more}" if shown else self.words


_SHOWN = 5
