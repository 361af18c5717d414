"""The model that all ranks share between exchanges, and the exchange that moves it. Used by ``_local_steps.py``.

Between two exchanges each rank trains its own copy. The outer model is what the last exchange left; validation and
checkpoints have it. An exchange sends what each rank moved since the round began, and the outer model takes one step
along the mean (``functional/communication/outer_step.py``). Weights travel as moves, so a weight that no rank moved
keeps its bits; float buffers travel as values, because the mean of moves could make a variance negative; integer
buffers come from rank 0. Each message says which buffers changed. One that never did is not sent after the first round;
if it changes later, it follows when the host reads that: at a log step, before a validation or at the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_grad.functional import communication as rules
from lightning_grad.strategies._collectives import Collectives
from lightning_grad.strategies._move_codecs import MoveCodec

OUTER, VELOCITY, RESIDUAL, START, WEIGHT = "outer", "velocity", "residual", "start", "weight"
_SHARED = (OUTER, VELOCITY)  # equal on all ranks
_DENSE, _PACKED, _INTEGERS = "dense", "packed", "integers"
_NAMES = ("names", "buffers", "watched")  # of an Exchange

Memory = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class OuterRule:
    """How the outer model moves.

    Args:
        lr: Learning rate of the outer step.
        momentum: Its Nesterov momentum.
        delayed: Whether the mean move arrives one round later, while ranks train on.
    """

    lr: float = 1.0
    momentum: float = 0.0
    delayed: bool = False


@dataclass(frozen=True)
class Exchange:
    """A message on its way.

    Args:
        names: The weights in it, in order.
        buffers: The buffers whose values are in it.
        watched: The buffers of which it says whether they changed.
        own: The message of this rank, for a checkpoint that is saved meanwhile; empty if the exchange is not late.
        finish: Functions that wait for the results.
    """

    names: Sequence[str]
    buffers: Sequence[str]
    watched: Sequence[str]
    own: Mapping[str, Tensor]
    finish: Mapping[str, Callable[[], Tensor]]


class OuterModel:
    """The shared model, and the weights and buffers of this rank.

    Args:
        rule: How it moves.
        codec: Compresses moves; ``None`` sends them as they are.
        memory: What is kept of each weight and buffer, by name: the outer value and its velocity, which are equal on
            all ranks, and the residual and the start of the round, which are not.

    Attributes:
        pending: The exchange that is on its way.
        statistics: Of the last exchange: mean squared norm of the ranks' moves, of their residuals, and squared norm
            of the mean move.
    """

    def __init__(self, rule: OuterRule, codec: MoveCodec | None, memory: Memory) -> None:
        self._rule, self._codec, self.memory = rule, codec, memory
        self.weights: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.pending: Exchange | None = None
        self.statistics: Tensor | None = None
        self._moving: list[str] | None = None  # buffers that are known to change; None in the first round
        self._changed: dict[str, Tensor] = {}  # of the others, since it was read: shares of ranks
        self._late: set[str] = set()  # buffers that the module got, or resized, after the first round began
        self._hidden: dict[str, Tensor] = {}

    # The tensors.

    @torch.no_grad()
    def adopt(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Exchange these tensors from now on. New ones are equal on all ranks; of others only the object may be new."""
        is_first = not self.memory
        self.weights, self.buffers = dict(weights), dict(buffers)
        for name, weight in weights.items():
            kept = self.memory.setdefault(name, {})
            if OUTER not in kept:
                kept[OUTER] = _exact(weight).clone()
            self._complete(kept, weight)
        for name, buffer in buffers.items():
            if name not in self.memory or self.memory[name][OUTER].shape != buffer.shape:
                self.memory[name] = {OUTER: buffer.detach().clone()}
                self._late |= set() if is_first else {name}
        for name in self.memory.keys() - weights.keys() - buffers.keys():
            del self.memory[name]

    def _complete(self, kept: dict[str, Tensor], weight: Tensor) -> None:
        outer = kept[OUTER]
        needed = {
            VELOCITY: bool(self._rule.momentum),
            RESIDUAL: self._codec is not None and self._codec.compresses(weight),
        }
        for key, is_needed in needed.items():
            if is_needed and key not in kept:
                zeros = torch.zeros_like(outer)
                kept[key] = zeros.reshape(-1) if key == RESIDUAL else zeros
            elif not is_needed:
                kept.pop(key, None)
        if not self._rule.delayed:
            kept.pop(START, None)
        elif START not in kept:
            kept[START] = self._start(outer, weight).clone()  # also if a run resumes with a delay in mid-round

    @property
    def misses_constants(self) -> bool:
        """Whether the first round is over, and the host has not read yet which buffers it changed."""
        return self._moving is None and bool(self._changed)

    @torch.no_grad()
    def catch_up(self, ranks: Collectives, is_apart: bool) -> None:
        """Read on the host which buffers began to change, and exchange them."""
        if not self._changed:
            return
        names, shares = list(self._changed), torch.stack(list(self._changed.values())).tolist()
        self._changed = {}
        begun = [name for name, share in zip(names, shares, strict=True) if share > 0 and name in self.buffers]
        if self._moving is not None:
            self._send_values(ranks, begun)
            if not (is_apart or self.pending is not None):
                self._give({name: self.buffers[name] for name in begun}, [self.memory[name][OUTER] for name in begun])
        self._moving = [*(self._moving or ()), *begun]

    def _send_values(self, ranks: Collectives, names: Sequence[str]) -> None:
        floats, integers = self._kinds(names)
        message = self._integers(integers)
        if floats:
            message[_DENSE] = torch.cat([_exact(self.buffers[name]).reshape(-1) for name in floats])
        arrived = {key: finish() for key, finish in _begin(ranks, message).items()}
        if floats:
            parts = torch.split(arrived[_DENSE], [self.memory[name][OUTER].numel() for name in floats])
            for name, mean in zip(floats, parts, strict=True):
                self.memory[name][OUTER].copy_(mean.view_as(self.memory[name][OUTER]))
        self._replace_integers(integers, arrived)

    # The exchange.

    @torch.no_grad()
    def exchange(self, ranks: Collectives, last: bool) -> None:
        """Send what this rank moved, and move the outer model; ``last`` waits for the message even if it may be late."""
        own = self._moves()
        self._settle()
        is_late = self._rule.delayed and not last
        self.pending = self._launch(ranks, own, is_late)
        if is_late:
            self._continue_from(own)
        else:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the message that is on its way, if any, and return to the outer model."""
        self._settle()
        self._give(self.weights, [self.memory[name][OUTER] for name in self.weights])
        sent = {name: buffer for name, buffer in self.buffers.items() if self._moving is None or name in self._moving}
        self._give(sent, [self.memory[name][OUTER] for name in sent])
        self._mark_start()

    def _settle(self) -> None:
        exchange, self.pending = self.pending, None
        if exchange is not None:
            self._apply(exchange, {key: finish() for key, finish in exchange.finish.items()})

    def _continue_from(self, own: Mapping[str, Tensor]) -> None:
        """Continue from the last known outer model and this rank's latest move, which is still on its way."""
        outer = [self.memory[name][OUTER] for name in self.weights]
        self._give(self.weights, torch._foreach_sub(outer, [own[name] for name in self.weights]))
        self._mark_start()

    @staticmethod
    def _give(tensors: Mapping[str, Tensor], values: Sequence[Tensor]) -> None:
        if tensors:
            torch._foreach_copy_([tensor.detach() for tensor in tensors.values()], list(values))

    def _mark_start(self) -> None:
        if self._rule.delayed and self.weights:
            starts = [self.memory[name][START] for name in self.weights]
            torch._foreach_copy_(starts, [weight.detach() for weight in self.weights.values()])

    def _moves(self) -> dict[str, Tensor]:
        kept = [(self.memory[name], weight) for name, weight in self.weights.items()]
        starts = [one[START] if START in one else self._start(one[OUTER], weight) for one, weight in kept]
        now = [_exact(weight) for weight in self.weights.values()]
        return dict(zip(self.weights, torch._foreach_sub(starts, now) if now else [], strict=True))

    @staticmethod
    def _start(outer: Tensor, weight: Tensor) -> Tensor:
        """Return where a weight began the round; one in half precision began at the rounded outer weight."""
        return outer if weight.dtype == outer.dtype else outer.to(weight.dtype).to(outer.dtype)

    def _launch(self, ranks: Collectives, own: Mapping[str, Tensor], is_late: bool) -> Exchange:
        watched = list(self.buffers)
        if self._moving is not None:
            self._moving += sorted(self._late.difference(self._moving))
        buffers = [name for name in watched if self._moving is None or name in self._moving]
        message = self._message(own, buffers)
        kept = {key: part.clone() for key, part in message.items()} if is_late else {}
        return Exchange(list(own), buffers, watched, kept, _begin(ranks, message))

    def _message(self, own: Mapping[str, Tensor], buffers: Sequence[str]) -> dict[str, Tensor]:
        packed = {name: move for name, move in own.items() if RESIDUAL in self.memory[name]}
        floats, integers = self._kinds(buffers)
        parts = [move.reshape(-1) for name, move in own.items() if name not in packed]
        parts += [_exact(self.buffers[name]).reshape(-1) for name in floats]
        message = self._integers(integers)
        if packed:
            assert self._codec is not None
            message[_PACKED] = self._codec.pack({n: (move, self.memory[n][RESIDUAL]) for n, move in packed.items()})
        tail = [
            torch.ones((), device=buffer.device)  # the outer value is still that of this rank
            if name in self._late
            else (buffer != self.memory[name][OUTER]).any().float()
            for name, buffer in self.buffers.items()
        ]
        self._late = set()
        if own:
            size = _squared_norm(list(own.values()))
            unsent = [self.memory[name][RESIDUAL] for name in packed]
            tail += [size, _squared_norm(unsent) if unsent else torch.zeros_like(size)]
        dense = torch.cat([*parts, *(value.view(1) for value in tail)]) if parts or tail else None
        return message if dense is None else {**message, _DENSE: dense}

    def _integers(self, buffers: Sequence[str]) -> dict[str, Tensor]:
        return {_INTEGERS: torch.cat([self.buffers[name].reshape(-1).long() for name in buffers])} if buffers else {}

    def _kinds(self, buffers: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the names of float buffers and of others."""
        floats = [name for name in buffers if self.memory[name][OUTER].is_floating_point()]
        return floats, [name for name in buffers if name not in floats]

    def _apply(self, exchange: Exchange, arrived: Mapping[str, Tensor]) -> None:
        """Move the outer model along the mean move."""
        packed = [name for name in exchange.names if RESIDUAL in self.memory[name]]
        plain = [name for name in exchange.names if name not in packed]
        floats, integers = self._kinds(exchange.buffers)
        sizes = [self.memory[name][OUTER].numel() for name in (*plain, *floats)]
        parts = list(torch.split(arrived[_DENSE], [*sizes, len(arrived[_DENSE]) - sum(sizes)])) if arrived else []
        moves = {name: parts.pop(0).view_as(self.memory[name][OUTER]) for name in plain}
        if packed:
            assert self._codec is not None
            shapes = {name: self.memory[name][OUTER].shape for name in packed}
            moves |= self._codec.mean(arrived[_PACKED], shapes)
        values = {name: parts.pop(0).view_as(self.memory[name][OUTER]) for name in floats}
        tail = parts.pop(0) if parts else torch.zeros(0)
        changed = dict(zip(exchange.watched, tail[: len(exchange.watched)], strict=True))
        self._note(changed)
        self._replace_floats(values, changed)
        self._replace_integers(integers, arrived)
        if moves:
            self.statistics = torch.cat([tail[-2:].float(), _squared_norm(list(moves.values())).view(1)])
            self._step(moves)

    def _note(self, changed: Mapping[str, Tensor]) -> None:
        """Keep which buffers changed that are not known to, until the host reads it."""
        for name, share in changed.items():
            if self._moving is None or name not in self._moving:
                before = self._changed.get(name)
                self._changed[name] = share.clone() if before is None else torch.maximum(before, share)

    def _step(self, moves: Mapping[str, Tensor]) -> None:
        kept = [self.memory[name] for name in moves]
        moved = [move.to(one[OUTER].dtype) for move, one in zip(moves.values(), kept, strict=True)]
        velocities = [one[VELOCITY] for one in kept] if self._rule.momentum else None
        rules.outer_step_([one[OUTER] for one in kept], moved, velocities, self._rule.lr, self._rule.momentum)

    def _replace_floats(self, floats: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
        for name, mean in floats.items():
            outer = self.memory[name][OUTER]  # the mean of equal values may differ from them by rounding
            outer.copy_(torch.where(changed[name] > 0, mean.to(outer.dtype), outer))

    def _replace_integers(self, integers: Sequence[str], arrived: Mapping[str, Tensor]) -> None:
        if integers:
            parts = torch.split(arrived[_INTEGERS], [self.memory[name][OUTER].numel() for name in integers])
            for name, part in zip(integers, parts, strict=True):
                self.memory[name][OUTER].copy_(part.view_as(self.memory[name][OUTER]))

    # What others see.

    @contextmanager
    def shown(self, is_apart: bool) -> Iterator[None]:
        """Give the module the outer model inside the block, if this rank is apart from it."""
        if self._hidden or not (is_apart or self.pending is not None):
            yield
            return
        tensors = {**self.weights, **self.buffers}
        with torch.no_grad():
            self._hidden = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self._give(tensors, [self.memory[name][OUTER] for name in tensors])
        try:
            yield
        finally:
            with torch.no_grad():
                self._give(tensors, list(self._hidden.values()))
            self._hidden = {}

    # State.

    def state(self, is_apart: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state of this rank, and the state that all ranks share."""
        own: Memory = {
            n: {k: v.clone() for k, v in kept.items() if k not in _SHARED} for n, kept in self.memory.items()
        }
        is_apart = is_apart or self.pending is not None
        for name, tensor in {**self.weights, **self.buffers}.items():
            value, outer = self._hidden.get(name, tensor).detach(), self.memory[name][OUTER]
            if is_apart or (name in self.buffers and not torch.equal(value.to(outer.device), outer)):
                own[name][WEIGHT] = value.clone()
        sent = self.pending
        names: dict[str, Any] = {key: list(getattr(sent, key)) for key in _NAMES} if sent else {}
        pending = sent and {**names, "message": dict(sent.own)}
        shared = {n: {k: v.clone() for k, v in kept.items() if k in _SHARED} for n, kept in self.memory.items()}
        return {"memory": own, "pending": pending}, {"outer": shared, "moving": self._moving}

    @torch.no_grad()
    def load(self, own: Mapping[str, Any], shared: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a state; ``tensors`` are those of the module, which has the outer model."""
        device = next(iter(tensors.values())).device
        for name in shared["outer"]:
            kept = {**shared["outer"][name], **own["memory"].get(name, {})}
            weight = kept.pop(WEIGHT, None)
            self.memory[name] = {key: value.to(device) for key, value in kept.items()}
            if weight is not None:
                tensors[name].detach().copy_(weight)
        self._moving = shared["moving"]

    def send_again(self, ranks: Collectives, pending: Mapping[str, Any], device: torch.device) -> None:
        """Send the message again that was on its way when the run was saved. Its bytes are already counted."""
        message = {key: part.to(device) for key, part in pending["message"].items()}
        kept = {key: part.clone() for key, part in message.items()}
        names: dict[str, list[str]] = {key: pending[key] for key in _NAMES}
        self.pending = Exchange(**names, own=kept, finish=_begin(ranks, message, counted=False))


def _begin(ranks: Collectives, message: Mapping[str, Tensor], counted: bool = True) -> dict[str, Callable[[], Tensor]]:
    begin = {_DENSE: ranks.begin_mean_, _PACKED: ranks.begin_gather, _INTEGERS: ranks.begin_copy_}
    return {key: begin[key](part, counted) for key, part in message.items()}


def _exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least: half precision would drop small moves."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))]).square().sum()
