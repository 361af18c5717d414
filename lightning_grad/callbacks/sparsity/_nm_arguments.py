"""Reading and checking the constructor's arguments, before anything is trained.

Used by :class:`lightning_grad.callbacks.NMSparsity` alone.
"""

from collections.abc import Mapping, Sequence

from lightning_grad.core.views.weight_choice import FoundWeight
from lightning_grad.functional import NMPattern, NMSchedule
from lightning_grad.functional.sparsity.nm_schedule import Recipe
from lightning_grad.utilities.parameters import first_match, matches

_FIXED = ("ste", "sr-ste", "step")  # one pattern all along, and the gradient straight through


def as_recipe(recipe: Recipe | Sequence[tuple[float, str]]) -> Recipe | list[tuple[float, str]]:
    """Return the recipe, or the list of stages, in plain types."""
    if isinstance(recipe, str):
        return recipe
    return [(float(share), str(text)) for share, text in recipe]


def default_phases(recipe: Recipe | list[tuple[float, str]]) -> tuple[float, float]:
    """Return the shares of the dense and of the fine-tuning phase that suit a recipe; docs/benchmarks.md has the sweep."""
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
    """Return the pattern of a weight: that of the first name pattern that matches one of its names.

    Args:
        found: The weight; some pattern matches it.
        patterns: N:M pattern by name pattern.
        display_name: Who asks, for the error.

    Raises:
        ValueError: If two name patterns name a tied parameter, each under another of its names, and want different ones.
    """
    names, key = found.names, first_match(found.names, patterns) or "*"
    covered = [name for name in names if matches(name, [key])]
    for other in patterns:
        own = [name for name in names if matches(name, [other])]
        if own and not set(own) & set(covered) and patterns[other] != patterns[key]:
            raise ValueError(
                f"{display_name}: {covered[0]} and {own[0]} are one tied parameter, and pattern gives them "
                f"{patterns[key]} and {patterns[other]}. Give both the same pattern."
            )
    return patterns[key]


def check_recipe(recipe: Recipe | list[tuple[float, str]], gradient: str, finetune: float, decay: float | None) -> None:
    """Raise where an argument contradicts the recipe.

    Raises:
        ValueError: With the argument to leave out or to change.
    """
    if recipe in _FIXED and gradient == "masked":
        raise ValueError(
            f"recipe={recipe!r} passes the gradient straight through by definition; gradient='masked' is for mdgf-*, "
            "sdgf-* and schedules of your own. Leave gradient at 'ste', or choose one of these recipes."
        )
    if recipe in _FIXED and finetune:
        raise ValueError(f"recipe={recipe!r} has its final pattern all along: leave finetune_fraction out.")
    if decay is not None and not (isinstance(recipe, str) and recipe.startswith("mdgf")):
        raise ValueError(
            f"decay belongs to mdgf-linear and mdgf-exponential; recipe={recipe!r} has none. Leave decay out."
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
        raise ValueError("A list of (share, pattern) says all phases: leave dense_fraction and finetune_fraction out.")
    stages = tuple((share, NMPattern.parse(text)) for share, text in recipe)
    if stages and set(patterns.values()) != {stages[-1][1]}:  # all layers go through the same stages
        raise ValueError(
            f"The schedule ends with {stages[-1][1]} for all layers, and pattern is {', '.join(map(str, patterns.values()))}: "
            f"write the last pattern of the schedule as pattern='{stages[-1][1]}' too."
        )
    return NMSchedule(stages, geometric_start=geometric_start)
