"""What is raised for a loss that is no mean of one term per sample, or is not known to be."""

from __future__ import annotations


class InseparableLossError(RuntimeError):
    """A loss that cannot be separated into one term per sample.

    Args:
        function: The function of the step at which the search ended, such as "div"; empty if there is none.
        location: Its place in the step's source, such as "module.py:31"; empty if there is none.
        reason: A sentence that starts after the function's name.

    Attributes:
        function: See above.
        location: See above.
        reason: See above.

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
