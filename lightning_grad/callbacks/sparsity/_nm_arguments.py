"""Reads and checks the constructor's arguments.

Used only by :class:`lightning_grad.callbacks.NMSparsity`.
"""

from collections.abc import Mapping, Sequence

from lightning_grad.core.views.weight_choice import FoundWeight
from lightning_grad.functional import NMPattern, NMSchedule
from lightning_grad.functional.sparsity.nm_schedule import Recipe
from lightning_grad.utilities.parameters import first_match, matches

_FIXED = ("ste", "sr-ste", "step")  # recipes with one pattern and the straight-through gradient


def as_recipe(recipe: Recipe | Sequence[tuple[float, str]]) -> Recipe | list[tuple[float, str]]:
    """Return the recipe, or the list of stages, as plain types."""
    if isinstance(recipe, str):
        return recipe
    return [(float(share), str(text)) for share, text in recipe]


def default_phases(recipe: Recipe | list[tuple[float, str]]) -> tuple[float, float]:
    """Return the default shares of the dense and the fine-tuning phase of a recipe; docs/benchmarks.md has the sweep."""
    is_gradual = isinstance(recipe, str) and recipe.startswith(("mdgf", "sdgf"))
    return 0.2 if recipe == "step" else 0.0, 0.2 if is_gradual else 0.0


def read_patterns(pattern: str | Mapping[str, str]) -> dict[str, NMPattern]:
    """Return the N:M pattern for each name pattern.

    Raises:
        ValueError: If there is none, or one is impossible.
    """
    if not pattern:
        raise ValueError("pattern names no N:M pattern. Write for example '2:4'.")
    by_name = {"*": pattern} if isinstance(pattern, str) else pattern
    return {name: NMPattern.parse(text) for name, text in by_name.items()}


def pattern_of(found: FoundWeight, patterns: Mapping[str, NMPattern], display_name: str) -> NMPattern:
    """Return the pattern of a weight: the first whose name pattern matches one of the weight's names.

    Args:
        found: The weight; at least one pattern matches it.
        patterns: N:M pattern by name pattern.
        display_name: Name of the callback in errors.

    Raises:
        ValueError: If two name patterns name a tied parameter, each under another of its names, and want different
        ones.
    """
    names, key = found.names, first_match(found.names, patterns) or "*"
    covered = [name for name in names if matches(name, [key])]
    for other in patterns:
        own = [name for name in names if matches(name, [other])]
        if own and not set(own) & set(covered) and patterns[other] != patterns[key]:
            raise ValueError(
                f"{display_name}: {covered[0]} and {own[0]} are one tied parameter, but pattern assigns them "
                f"{patterns[key]} and {patterns[other]}. Assign the same pattern to both."
            )
    return patterns[key]


def check_recipe(recipe: Recipe | list[tuple[float, str]], gradient: str, finetune: float, decay: float | None) -> None:
    """Raise if an argument contradicts the recipe.

    Raises:
        ValueError: With the argument to remove or change.
    """
    if recipe in _FIXED and gradient == "masked":
        raise ValueError(
            f"recipe={recipe!r} passes the gradient straight through by definition; gradient='masked' is for mdgf-*, "
            "sdgf-* and your own schedules. Keep gradient='ste', or choose one of these recipes."
        )
    if recipe in _FIXED and finetune:
        raise ValueError(f"recipe={recipe!r} uses its final pattern from the start. Remove finetune_fraction.")
    if decay is not None and not (isinstance(recipe, str) and recipe.startswith("mdgf")):
        raise ValueError(
            f"decay belongs to mdgf-linear and mdgf-exponential; recipe={recipe!r} has none. Remove decay."
        )


def read_schedule(
    recipe: Recipe | list[tuple[float, str]],
    patterns: Mapping[str, NMPattern],
    dense_fraction: float,
    finetune_fraction: float,
    decay: float | None,
    geometric_start: int,
) -> NMSchedule:
    """Return the schedule that the arguments describe.

    Raises:
        ValueError: If a list of stages is given with phases, or does not end with the pattern.
    """
    if isinstance(recipe, str):
        return NMSchedule(recipe, dense_fraction, finetune_fraction, decay, geometric_start)
    if dense_fraction or finetune_fraction:
        raise ValueError("A list of (share, pattern) defines all phases. Remove dense_fraction and finetune_fraction.")
    stages = tuple((share, NMPattern.parse(text)) for share, text in recipe)
    if stages and set(patterns.values()) != {stages[-1][1]}:  # all layers go through the same stages
        raise ValueError(
            f"The schedule ends with {stages[-1][1]} for all layers, but pattern is {', '.join(map(str, patterns.values()))}. "
            f"Set the last pattern of the schedule as pattern='{stages[-1][1]}' too."
        )
    return NMSchedule(stages, geometric_start=geometric_start)
