"""The domains of a training set: how a user names them, and which samples belong to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

Named = Sequence[str] | Mapping[str, Sequence[int]] | Callable[[Any], Any]
"""Names of the parts of a ``ConcatDataset``, indices by name, or a function of the data set."""

_NOWHERE = -1  # the domain of samples that belong to none
_FORMS = (
    "Name the parts of a ConcatDataset, map names to indices of samples, or pass a function that takes the data set and "
    "returns the domain of each sample."
)


@dataclass(frozen=True)
class Domains:
    """The domains of a training set.

    Args:
        names: Their names.
        of_sample: Number of the domain of each sample in the data set, (n,); -1 if it belongs to none.
        population: Indices of the samples that training can draw.
    """

    names: list[str]
    of_sample: Tensor
    population: Tensor

    @cached_property
    def members(self) -> list[list[int]]:
        """The samples of each domain that training can draw."""
        own = self.of_sample[self.population]
        return [self.population[own == number].tolist() for number in range(len(self.names))]

    @cached_property
    def shares(self) -> list[float]:
        """The share of each domain in the samples that belong to one."""
        counts = [len(each) for each in self.members]
        return [count / sum(counts) for count in counts]


def check_domains(domains: Named) -> None:
    """Raise unless the argument names at least two different domains.

    Raises:
        ValueError: For fewer than two, an empty or repeated name, an empty domain, or an index that is negative or
            belongs to two domains.
    """
    if callable(domains):
        return
    names = list(domains)
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise ValueError(f"domains must name at least two different domains; got {names}. {_FORMS}")
    if isinstance(domains, Mapping):
        seen: dict[int, str] = {}
        for name, indices in domains.items():
            if not len(indices):
                raise ValueError(f"domains[{name!r}] must have at least one index; got none. Drop the domain.")
            for index in indices:
                if index < 0 or index in seen:
                    problem = f"which is also in {seen[index]!r}" if index in seen else "which is below 0"
                    raise ValueError(f"domains[{name!r}] has the index {index}, {problem}. Each sample has one domain.")
                seen[index] = name


def find_domains(domains: Named, dataset: Any, population: Tensor, display_name: str) -> Domains:
    """Return the domains of a training set.

    Args:
        domains: What the user gave.
        dataset: The data set.
        population: Indices of the samples that training can draw.
        display_name: Name of the technique, for errors.

    Raises:
        TypeError: If names are given and the data set is not a ``ConcatDataset``, or a subset of one.
        ValueError: If the domains do not fit the data set, or one has no sample that is drawn.
    """
    total = len(dataset)
    if isinstance(domains, Mapping):
        names, of_sample = list(domains), torch.full((total,), _NOWHERE)
        for number, (name, indices) in enumerate(domains.items()):
            if max(indices) >= total:
                raise ValueError(
                    f"{display_name}(domains=...) has the index {max(indices)} in {name!r}, but the training set has "
                    f"{total} samples. Use indices below {total}."
                )
            of_sample[torch.tensor(list(indices))] = number
    elif callable(domains):
        names, of_sample = _by_labels(domains(dataset), total, display_name)
    else:
        names, of_sample = list(domains), _by_parts(dataset, len(domains), display_name)
    found = Domains(names, of_sample, population)
    empty = [name for name, members in zip(names, found.members, strict=True) if not members]
    if empty:
        raise ValueError(
            f"{display_name} found no training sample of the domain {empty[0]!r}. Drop the domain, or train on its samples."
        )
    return found


def _by_labels(labels: Any, total: int, display_name: str) -> tuple[list[str], Tensor]:
    """Return names and numbers of domains from a label for each sample; ``None`` is no domain."""
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    is_list = isinstance(labels, Sequence) and not isinstance(labels, str)
    if not is_list or len(labels) != total or not all(isinstance(each, str | int | None) for each in labels):
        got = f"{len(labels)} entries" if is_list else type(labels).__name__
        raise ValueError(
            f"The function in {display_name}(domains=...) must return the domain of each of the {total} samples, a name, a "
            f"number or None; got {got}."
        )
    known = sorted({each for each in labels if each is not None}, key=lambda each: (isinstance(each, str), each))
    if len(known) < 2:
        raise ValueError(
            f"The function in {display_name}(domains=...) must return at least two different domains; got {known}."
        )
    number = {label: place for place, label in enumerate(known)} | {None: _NOWHERE}
    return [str(each) for each in known], torch.tensor([number[each] for each in labels])


def _by_parts(dataset: Any, count: int, display_name: str) -> Tensor:
    if isinstance(dataset, Subset):
        return _by_parts(dataset.dataset, count, display_name)[torch.as_tensor(dataset.indices)]
    if not isinstance(dataset, ConcatDataset):
        raise TypeError(
            f"{display_name}(domains=[...]) names the parts of a ConcatDataset, but the training set is "
            f"{type(dataset).__name__}. {_FORMS}"
        )
    sizes = torch.tensor([len(part) for part in dataset.datasets])  # type: ignore[arg-type]
    if len(sizes) != count:
        raise ValueError(
            f"{display_name}(domains=[...]) names {count} domains, but the ConcatDataset has {len(sizes)} parts. Give one "
            "name for each part."
        )
    return torch.arange(count).repeat_interleave(sizes)
