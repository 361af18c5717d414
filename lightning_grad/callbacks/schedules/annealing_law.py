"""The annealing law: the callback. The law is in ``functional/schedules/annealing_law.py``."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_grad.callbacks.schedules._future_rates import UnknownRatesError, future_rates, has_followed, rate_of
from lightning_grad.core.callback import GradCallback
from lightning_grad.core.compatibility import Compatibility, manual, no
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.progress import check_total_steps, total_steps
from lightning_grad.core.ranks import mean_over_ranks
from lightning_grad.core.record import RunRecord
from lightning_grad.functional import LossForecast, forecast_loss
from lightning_grad.functional.plain_tensors import plain_tensor
from lightning_grad.utilities.checks import check_above, check_between, check_count
from lightning_grad.utilities.reporting import is_log_step, log_many, stepped_batches

_GROWTH = 1.1  # a forecast is due when the run has this many times the steps of the last one
_LEAST_STEPS = 16


class AnnealingLaw(GradCallback):
    r"""Forecast the final training loss of the run from its learning rates (scaling law with annealing).

    .. math::
        L(s) = L_0 + A \, S_1(s)^{-\alpha} - C \, S_2(s)

    S1 is the sum of all learning rates so far and S2 the annealing so far
    (:func:`~lightning_grad.functional.annealing_areas`). The constants are fitted to the losses of the steps so far, and
    copies of the schedulers run ahead to the end of the run. **It is silent until a forecast can be trusted:** 3 / (1 -
    decay) steps have passed, a tenth of the run's annealing has been seen, learning rates have followed the schedulers,
    and refits on parts of the steps agree within ``max_band``
    (:func:`~lightning_grad.functional.forecast_loss`). It only observes.

    Args:
        decay: Memory of the annealing per step (0.999 in the paper).
            Runs of fewer than 3 / (1 - decay) steps get no forecast.
        max_band: Widest band of refits to log a forecast, as a share of the loss.
        refits: Number of refits on random blocks of steps, in addition to 8 that leave one block out.
        seed: Seed of the random blocks.
        total_steps: Length of the run in optimizer steps. Default: the Trainer's.
        figure: Whether to draw the forecasts at the end.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for a number outside its range. In setup for manual optimization. When training
            starts, if the run has no known end.

    **Hooks.** ``on_before_optimizer_step`` reads the learning rate, ``on_train_batch_end`` the loss that
    ``training_step`` returned, without a host sync. A forecast is made at a log step or at the end of an epoch, whenever
    the run has 10 % more steps than at the last one.

    **Logs** under ``annealing_law/``, with each forecast that can be trusted: ``final_loss`` and ``band`` (width of the
    band of refits, as a share of the loss). In the summary ``final_loss`` and ``loss`` (mean over the last 2 % of the
    steps). At the end: a table of all forecasts, also those that cannot be trusted, each with the reason, and a figure:
    ``annealing_law.csv`` and ``.png``.

    **State.** Learning rates and losses of all steps, and the forecasts. Resuming is bit-exact. With several ranks, steps
    since the last log step continue with the losses of the first rank.

    **Cost.** Nothing per step. A forecast takes some tenths of a second; there are about 25 in a run ten times as long as
    the first forecast. The first one also runs the schedulers ahead, in about ten microseconds per remaining step. The
    state holds 16 bytes per step.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AnnealingLaw

    References:
        Tissue, Wang and Wang, "Scaling Law with Learning Rate Annealing", 2024, arXiv 2408.11029, which fits finished
        curves of language models. Forecasts during a run, and the rules of when to trust one, are additions of this
        library.
    """

    namespace: ClassVar[str] = "annealing_law"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        **manual(
            no(
                "does not work with {}: it needs one loss and one learning rate for each step",
                "Record both yourself, and call lightning_grad.functional.forecast_loss",
            )
        ),
    )
    trial: ClassVar[Mapping[str, Any]] = {"decay": 0.5, "max_band": 10.0, "refits": 0}
    neutral: ClassVar[Mapping[str, Any] | str] = {}

    record = until_next_fit.of(RunRecord).saved()
    _fitted_at = until_next_fit.of(int).saved()
    _final = until_next_fit[float](lambda _: math.nan).saved()  # the last forecast that could be trusted
    _problem = until_next_fit.of(str).saved()  # of the last forecast
    _curve = until_next_fit[tuple[list[float], list[float]]](lambda _: ([], []))
    _pending = until_next_fit.of(list[tuple[Any, Tensor]])
    _window = during_fit.of(list[Tensor])  # losses since the last step
    _rate = during_fit[Any](lambda _: None)
    _plan = during_fit[tuple[int, list[float]] | None](lambda _: None)  # a step, and the learning rates from it on

    def __init__(
        self,
        decay: float = 0.999,
        max_band: float = 0.05,
        refits: int = 16,
        seed: int = 0,
        total_steps: int | None = None,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.decay = check_between(decay, 0.0, 1.0, "decay")
        if decay == 1.0:
            raise ValueError("decay must be below 1: the law would need a run without end. Use 0.999.")
        self.max_band = check_above(max_band, 0.0, "max_band")
        self.refits = check_count(refits, 0, "refits")
        self.seed = check_count(seed, 0, "seed")
        self.total_steps = check_total_steps(total_steps)
        self.figure = figure

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Learning rates and losses of the steps so far, for :func:`~lightning_grad.functional.fit_annealing_law`."""
        return self._curve

    @override
    def state_dict(self) -> dict[str, Any]:
        pending = [(float(rate), float(loss)) for rate, loss in self._pending]
        return {
            **super().state_dict(),
            "curve": torch.tensor(self._curve, dtype=torch.float64),
            "pending": torch.tensor(pending, dtype=torch.float64).reshape(-1, 2),
        }

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        rates, losses = state["curve"].tolist()
        self._curve = rates, losses
        self._pending = [(rate, torch.tensor(loss)) for rate, loss in state["pending"].tolist()]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        words = (
            f"forecasts the final loss, from step {self._least_steps} on, while refits agree within {self.max_band:.0%}"
        )
        self.announce(words, "losses", ["training_step"])

    @property
    def _least_steps(self) -> int:
        return max(math.ceil(3.0 / (1.0 - self.decay)), _LEAST_STEPS)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total_steps(trainer, self.display_name, self.total_steps)  # raises if the run has no known end

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        rate = rate_of(optimizer)
        self._rate = rate.detach().clone() if isinstance(rate, Tensor) else rate

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided the loss by the number of batches of a step.
            self._window.append(plain_tensor(loss).detach().float().reshape(()) * trainer.accumulate_grad_batches)
        if self._rate is not None and self._window:
            mean = self._window[0] if len(self._window) == 1 else torch.stack(self._window).mean()
            self._pending.append((self._rate, mean))
            self._window, self._rate = [], None
        if trainer.is_last_batch or is_log_step(trainer):
            self._collect(trainer)
            if len(self._curve[0]) >= max(self._least_steps, _GROWTH * self._fitted_at):
                self._forecast(trainer, pl_module, batch_idx)

    def _collect(self, trainer: pl.Trainer) -> None:
        """Move the pending losses to the host, averaged over the ranks."""
        if self._pending:
            rates, losses = zip(*self._pending, strict=True)
            device = trainer.strategy.root_device
            self._curve[0].extend(float(rate) for rate in rates)
            self._curve[1].extend(mean_over_ranks(trainer, torch.stack([loss.to(device) for loss in losses])).tolist())
            self._pending = []

    def _forecast(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        rates, losses = self._curve
        steps = self._fitted_at = len(rates)
        row: dict[str, Any] = {"step": stepped_batches(trainer), "final_loss": None, "low": None, "high": None}
        problem = self._problem_of(losses)
        if not problem:
            try:
                rest, problem = self._rest(trainer, pl_module, batch_idx)
                found = forecast_loss([(rates, losses)], [*rates, *rest], self.decay, self.refits, self.seed)
                row |= {"final_loss": found.loss, "low": found.low, "high": found.high}
                problem = problem or self._judged(found)
            except (UnknownRatesError, ValueError) as error:  # also too few losses after the highest learning rate
                problem = str(error)
        self._problem = problem
        self.record.add({**row, "steps": steps, "problem": problem})
        self.record.save(trainer, self)
        if problem:
            return
        self._final = row["final_loss"]
        band = (row["high"] - row["low"]) / row["final_loss"]
        log_many(trainer, {self.log_key("final_loss"): self._final, self.log_key("band"): band})
        low, high = row["low"], row["high"]
        self.tell_once("first", rank_zero_info, f"expects a final loss of {self._final:.4g} ({low:.4g} to {high:.4g}).")

    def _judged(self, found: LossForecast) -> str:
        """Return why a forecast is not to be trusted, with the limit of this instance for the band."""
        if found.problem.startswith("Refits differ"):
            return "" if found.band <= self.max_band else f"Refits differ by {found.band:.0%} of the loss."
        if not found.problem and found.band > self.max_band:
            return f"Refits differ by {found.band:.1%} of the loss."
        return found.problem

    @staticmethod
    def _problem_of(losses: list[float]) -> str:
        least = min((loss for loss in losses if math.isfinite(loss)), default=math.nan)
        return "" if least > 0.0 else f"The law needs losses above 0; the least was {least:.3g}."

    def _rest(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> tuple[list[float], str]:
        """Return the learning rates of the rest of the run, and why they may be wrong; empty if they may not."""
        steps, total = len(self._curve[0]), total_steps(trainer, self.display_name, self.total_steps)
        if total is None:
            raise UnknownRatesError("The length of the run is unknown in its first epoch.")
        if self._plan is not None:
            begin, plan = self._plan
            passed = steps - begin
            if len(plan) == total - begin and has_followed(plan[:passed], self._curve[0][begin:]):
                return plan[passed:], ""
        problem = "" if self._plan is None else "Learning rates or the length of the run did not follow the plan."
        plan = future_rates(trainer, pl_module, max(total - steps, 0), batch_idx)
        self._plan = steps, plan
        return plan, problem

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer)  # the run may end within an epoch, between log steps
        losses = self._curve[1]
        if not losses:
            return
        last = losses[-max(len(losses) // 50, 1) :]
        summary = {"loss": sum(last) / len(last)}
        if math.isnan(self._final):
            why = self._problem or f"The run ended before step {self._least_steps}."
            self.say(f"made no forecast that can be trusted. {why.removesuffix('.')}")
        else:
            summary["final_loss"] = self._final
        self.record.report(trainer, self, summary=summary)
