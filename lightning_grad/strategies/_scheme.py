"""The interface of a compression scheme: four methods on named gradients, and a memory that each rank saves.

``compressed_ddp.py`` calls the methods during a run; ``_rank_saving.py`` saves and loads the memory.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_grad.core.fit import until_next_fit
from lightning_grad.functional import total_norm
from lightning_grad.strategies._buckets import Gradient
from lightning_grad.strategies._rank_files import State
from lightning_grad.strategies._rank_saving import RankSavingDDP
from lightning_grad.utilities.parameters import all_names, clean_name, matches

Message = dict[str, Tensor]

_MOST_ENTRIES = 2**31  # of a compressed tensor: indices are int32


class SchemeDDP(RankSavingDDP):
    """Interface and saved state of a compression scheme; each rank writes a file with every full checkpoint.

    Attributes:
        memory: Tensors that the scheme keeps for each parameter, by name.
        step: Number of exchanges before the current one.
    """

    exclude: list[str] | None
    min_numel: int

    # Needed by checkpoints that are written after the fit or after an exception.
    memory = until_next_fit.of(dict[str, dict[str, Tensor]])
    step = until_next_fit.of(int)
    _noise = until_next_fit[Tensor | None](lambda _: None)  # running averages of noise and signal
    _parameters = until_next_fit.of(dict[str, Tensor])
    _names = until_next_fit.of(dict[int, str])
    _tied = until_next_fit.of(dict[str, list[str]])
    _order = until_next_fit.of(dict[str, int])
    _shapes = until_next_fit.of(dict[str, tuple[torch.Size, int]])
    _chosen = until_next_fit.of(set[str])
    _in_flight = until_next_fit[Message | None](lambda _: None)
    _replayed = until_next_fit[Message | None](lambda _: None)
    _is_accumulated = until_next_fit.of(bool)

    # What a scheme defines.

    @property
    def gradient_is_compressed(self) -> bool:
        """Whether the scale of ``.grad`` differs from the mean gradient's; clipping callbacks then raise."""
        return False

    @property
    def gradient_holds_momentum(self) -> bool:
        """Whether ``.grad`` includes momentum and the optimizer applies none; known once an optimizer is connected."""
        return False

    @property
    def wants_to_compress(self) -> bool:
        """Whether the settings compress anything."""
        return True

    @property
    @override
    def is_neutral(self) -> bool:
        """Whether nothing in this module is compressed, so the run is plain DDP."""
        return not self._chosen

    @property
    @override
    def has_state(self) -> bool:
        return super().has_state or self._is_accumulated

    @property
    def is_active(self) -> bool:
        """Whether the current step is compressed; otherwise all gradients are sent dense."""
        return True

    @property
    def remark(self) -> str:
        """Sentence appended to the line printed at the start of a fit, with a leading space; may be empty."""
        return ""

    def compresses(self, name: str, parameter: Tensor) -> bool:
        """Return whether a parameter's gradient is compressed. Must not depend on rank or step."""
        large = parameter.dim() > 1 and self.min_numel <= parameter.numel() < _MOST_ENTRIES
        return large and not matches(self.names_of(name), self.exclude or [])

    def names_of(self, name: str) -> list[str]:
        """Return all names of a parameter; a tied parameter has several."""
        return self._tied.get(name, [name])

    @abstractmethod
    def accumulate(self, gradients: Sequence[Gradient]) -> None:
        """Add the gradients of this rank to the memory. Not called again when a batch is repeated after a resume."""

    @abstractmethod
    def send(self, gradients: Sequence[Gradient]) -> Message:
        """Exchange the memories and return the result, identical on all ranks.

        Communicate through ``self.ranks`` only: it counts the bytes.
        """

    @abstractmethod
    def settle(self, gradients: Sequence[Gradient], message: Message, arrived: Tensor) -> None:
        """Remove what was sent from the memory, unless ``arrived``, a 0-dimensional bool tensor, is false."""

    @abstractmethod
    def write(self, gradients: Sequence[Gradient], message: Message, failure: Tensor) -> None:
        """Write the mean that ``message`` encodes into the gradients, and add ``failure`` (0 or NaN) to all values."""

    @abstractmethod
    def unsent(self) -> Iterator[Tensor]:
        """Yield the residuals of this rank."""

    @abstractmethod
    def sent_bytes(self, name: str, shape: torch.Size, itemsize: int) -> int:
        """Return the bytes of a compressed gradient in the messages of one step."""

    def figures(self) -> dict[str, float]:
        """Return additional values to log at log steps."""
        return {}

    def release_optimizer(self) -> None:
        """Restore the optimizer after its update has failed."""

    def residual_norm(self) -> float:
        """Return the 2-norm of the gradients that this rank has not sent."""
        residuals = list(self.unsent())
        return float(total_norm(residuals)) if residuals else 0.0

    # The module's parameters.

    def _inspect(self, model: DistributedDataParallel) -> None:
        named = [(clean_name(name), parameter) for name, parameter in model.module.named_parameters()]
        self._parameters = dict(named)
        self._names = {id(parameter): name for name, parameter in named}
        self._tied = {names[0]: names for names in all_names(model.module).values()}
        self._order = {name: place for place, (name, _) in enumerate(named)}
        self._chosen = {name for name, p in named if p.requires_grad and self.compresses(name, p)}
        self._shapes = {name: (p.shape, p.element_size()) for name, p in named if p.requires_grad}

    # The saved state.

    @override
    def rank_state(self) -> State:
        memory = {name: {key: value.clone() for key, value in kept.items()} for name, kept in self.memory.items()}
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        is_under_way = self._trainer.interrupted and batches.started > batches.processed  # the batch will be repeated
        in_flight = self._in_flight if is_under_way else None
        shared = {"in_flight": in_flight, "ledger": self.ledger.state_dict(), "noise": self._noise}
        return {"memory": memory, "is_accumulated": self._is_accumulated}, shared

    @override
    def forget_rank_state(self) -> None:
        self.memory, self._replayed, self._noise, self._is_accumulated = {}, None, None, False

    @override
    def named_tensors(self) -> dict[str, Tensor]:
        return self._parameters

    @override
    def load_rank_state(self, own: Mapping[str, Any], shared: Mapping[str, Any], changed: set[str]) -> None:
        to, saved = self.root_device, own["memory"]
        self.memory = {n: {key: v.to(to) for key, v in kept.items()} for n, kept in saved.items() if n in self._chosen}
        if len(self.memory) < len(saved):
            lost = ", ".join(sorted(saved.keys() - self._chosen))
            rank_zero_warn(f"{self.display_name} no longer compresses {lost}: their unsent gradients are lost.")
        self._is_accumulated = own["is_accumulated"]
        message = shared["in_flight"]
        if message is not None and changed:
            rank_zero_warn(
                f"{self.display_name} has new settings: the gradient that was exchanged but not used yet is lost."
            )
            message = None
        self._replayed = None if message is None else {key: value.to(to) for key, value in message.items()}
        self.ledger.load_state_dict(shared["ledger"])
        self._noise = shared["noise"]
