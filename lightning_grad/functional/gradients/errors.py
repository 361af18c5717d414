"""The error for a loss that is not, or not provably, a mean of one term per sample."""

from __future__ import annotations


class InseparableLossError(RuntimeError):
    """Raised if a loss cannot be separated into one term per sample.

    Args:
        function: The function of the step that prevents it, such as "div"; empty if unknown.
        location: The place of its call, such as "module.py:31"; empty if unknown.
        reason: The rest of the sentence, which follows the function's name.

    Attributes:
        function: As above.
        location: As above.
        reason: As above.

    Example:
        >>> print(InseparableLossError("div", "module.py:31", "mixes the samples."))
        div (module.py:31) mixes the samples.
    """

    def __init__(self, function: str, location: str, reason: str) -> None:
        self.function = function
        self.location = location
        self.reason = reason
        place = f"{function} ({location})" if location else function
        super().__init__(f"{place} {reason}".strip())

    def __reduce__(self) -> tuple[type[InseparableLossError], tuple[str, str, str]]:
        return type(self), (self.function, self.location, self.reason)
