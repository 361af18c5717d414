"""The first step whose gradient was not finite, as ``GradientMonitor`` tells of it."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_grad.utilities.forward_order import ForwardOrder
from lightning_grad.utilities.reporting import log_file, log_summary, output_file, send_alert


class FirstBadStep:
    """The first step whose gradient was not finite: its facts, and whether the user has been told."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {}
        self._is_told = False

    def note(self, facts: dict[str, Any], order: ForwardOrder) -> None:
        """Take in the facts of a bad step of one optimizer, unless one is known already."""
        if not facts or self._facts:
            return
        names = facts.pop("parameters")
        first = order.sort(names)[0] if names else "no single gradient: the sum of squares overflows"
        self._facts = {**facts, "parameter": first, "bad_parameters": len(names)}

    def tell(self, trainer: pl.Trainer, display_name: str, key: Callable[[str], str], alert: bool) -> None:
        """Say once which step it was, and leave its facts in a file."""
        if not self._facts or self._is_told:
            return
        self._is_told, facts = True, self._facts
        text = (
            f"the gradient was not finite for the first time at step {facts['step']}, epoch {facts['epoch']}, batch "
            f"{facts['batch_idx']}, loss {facts['loss']:g}: {facts['parameter']}, first of {facts['bad_parameters']}."
        )
        rank_zero_warn(f"{display_name}: {text}")
        log_summary(trainer, {key(f"first_bad_{fact}"): float(facts[fact]) for fact in ("step", "batch_idx")})
        path = output_file(trainer, display_name, "_first_bad_step.json")
        if path is not None and trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**facts, "loss": str(facts["loss"]), "norm": str(facts["norm"])}, indent=2))
            log_file(trainer, path, name=path.stem, kind="facts")
        if alert:
            send_alert(trainer, f"{display_name}: gradient not finite", text)

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {"first_bad": dict(self._facts), "told": self._is_told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what is known."""
        self._facts, self._is_told = dict(state["first_bad"]), bool(state["told"])
