"""Adversarial training: attack the inputs of each step. ``functional/adversarial`` has the attacks as functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.adversarial._attack import Attack, NoLossError, attack_losses, generator_for, refused
from lightning_grad.callbacks.adversarial._overfitting import OverfittingCheck
from lightning_grad.callbacks.adversarial._places import COMPILED, Place, Run, find_place
from lightning_grad.core.callback import Chosen, GradCallback
from lightning_grad.core.compatibility import WHOLE_WEIGHTS, Compatibility, manual, no
from lightning_grad.core.dispatch import WrapOrder, wrap_method
from lightning_grad.core.fit import during_fit
from lightning_grad.core.losses.sample_losses import loss_of_output
from lightning_grad.core.progress import IN_FIRST_EPOCH, check_total_steps, run_progress, total_steps
from lightning_grad.core.quiet import is_quiet, quiet
from lightning_grad.core.steps.step_window import is_repeated
from lightning_grad.functional.adversarial.attacks import IndependentLossError
from lightning_grad.utilities.batches import same_tensors
from lightning_grad.utilities.checks import check_between, check_count, check_share, refuse_dataloader_iter
from lightning_grad.utilities.reporting import is_log_step, log_many

_PGD_STEPS = 7
_NO_MANUAL = no(
    "does not work with {}: its training_step also steps the optimizer, so an attack through it would train",
    "Train with automatic optimization, or measure with AdversarialEvaluation, which works with both",
)


class AdversarialTraining(GradCallback):
    r"""Train on inputs moved to where the loss is higher, by FGSM or PGD through the module's own step.

    .. math::
        \min_\theta \; \mathbb E_{(x, y)} \max_{\lVert \delta \rVert \le \epsilon} L(f_\theta(x + \delta), y)

    The inner maximum is approximated by one step (FGSM) or several (PGD) along the gradient of the loss that
    the module's own ``training_step`` returns. The real step then gets a new batch in which only the input
    differs. Side effects of the step during the attack (logs, metrics, BatchNorm, random numbers, gradients)
    are undone.

    Args:
        epsilon: Radius of the ball in units of the input, or of pixels if mean and std are set.
            The default is 8/255, as on CIFAR-10.
        attack: "fgsm" for one step (claimed to be as good as PGD in arXiv 2001.03994), "pgd" for several.
        steps: Steps of PGD (7 by default, as in the paper's CIFAR-10 training).
        step_size: Step size of the attack. Default: 1.25 epsilon for FGSM, 2.5 epsilon / steps for PGD.
            FGSM without random start uses epsilon.
        norm: Norm of the ball over each sample, "linf" or "l2".
        random_start: Whether to start at a random point of the ball; without it, FGSM soon overfits.
        bounds: Minimum and maximum of an input, such as [0, 1]; None for no limit.
        mean: Mean with which inputs were normalized, one number or one per channel.
            With mean and std, epsilon and bounds are in pixels.
        std: Standard deviation by which inputs were divided, one number or one per channel.
        clean_fraction: Share of the samples of each batch that are not attacked, at least 0 and below 1.
            (arXiv 1412.6572 weights the losses of both by one half.)
        input_key: Key or position of the input in the batch, or "embedding".
            Join nested keys with dots; "*" stands for every item of a list. Default: the first floating-point
            tensor with at least two dimensions whose name does not denote a target, mask or weight; if the batch
            is a list of samples, that tensor of every sample. If there is none, or an integer tensor comes
            first: the output of the first nn.Embedding.
        warmup_fraction: Share of the run in which epsilon grows linearly from 0.
        check_every_n_epochs: Check for overfitting to the attack every this many epochs; None disables it.
            It logs the accuracy of one batch under PGD with 10 steps, and under the training attack.
            FGSM may lose all robustness within an epoch, and only this check shows it.
        seed: Seed of random starts and of the choice of clean samples.
        total_steps: Length of the run in optimizer steps, for warmup_fraction. Default: the Trainer's.
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for a number outside its range, steps other than 1 with FGSM, or mean
            without std. In setup for manual optimization, sharded strategies and
            ``training_step(dataloader_iter)``. At the start for warmup_fraction in a run of unknown length. At
            the first batch for inputs outside the bounds, or an input_key that the batch does not have.
        TypeError: At the first batch, if it has no floating-point tensor, or an integer tensor comes first, and
            the module has no embedding; or if the input is sparse or nested.
        RuntimeError: At the first batch, if the loss does not depend on the input, the step changes trained
            parameters, or lazy layers have no size yet.

    **Hooks.** ``training_step`` is wrapped on the instance. Techniques that read or weight the loss see
    attacked inputs; techniques that score samples see clean inputs.

    **Logs** under ``adversarial/``: at log steps ``epsilon`` and ``loss_gain`` (the loss of the step minus the
    loss at the start of the attack); every check_every_n_epochs epochs ``attack_accuracy`` and ``pgd_accuracy``
    of one batch, in eval mode. Values that the module logs in its step are measured on attacked inputs.

    **State.** None except its settings. Random numbers depend on seed, epoch, batch and rank, so resuming is
    bit-exact.

    **Cost.** A forward pass and a backward pass to the input per step of the attack; see docs/benchmarks.md.

    Closures that are evaluated several times per step (LBFGS, SAM) see the same attack each time.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.AdversarialTraining
                  init_args:
                    epsilon: 0.03137
                    attack: fgsm
                    bounds: [0.0, 1.0]

    References:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv 1706.06083, equation 2.
        Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015, arXiv 1412.6572 (FGSM, clean_fraction).
        Wong et al., "Fast is better than free: Revisiting adversarial training", 2020, arXiv 2001.03994 (random start).
        Embeddings: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification", 2017, arXiv
        1605.07725. The warm-up of epsilon and check_every_n_epochs are our additions.
    """

    namespace: ClassVar[str] = "adversarial"
    compatibility: ClassVar[Compatibility] = GradCallback.compatibility.but(
        compiled=COMPILED, **manual(_NO_MANUAL), **WHOLE_WEIGHTS
    )
    trial: ClassVar[Mapping[str, Any]] = {"epsilon": 0.1}
    of_batch: ClassVar[tuple[str, ...]] = ("_attacked",)
    neutral: ClassVar[Mapping[str, Any] | str] = {"epsilon": 0.0}

    _place = during_fit[Place | None](lambda _: None)
    _start_loss = during_fit[Tensor | None](lambda _: None)
    _logged = during_fit.of(dict[str, Tensor | float])
    _attacked = during_fit[tuple[Any, Any, tuple[Place, Tensor]] | None](lambda _: None)

    @during_fit
    def _overfitting(self) -> OverfittingCheck:
        return OverfittingCheck(self._attack, self.seed, self.display_name)

    def __init__(
        self,
        epsilon: float = 8 / 255,
        attack: Literal["fgsm", "pgd"] = "fgsm",
        steps: int | None = None,
        step_size: float | None = None,
        norm: Literal["linf", "l2"] = "linf",
        random_start: bool = True,
        bounds: Sequence[float] | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        clean_fraction: float = 0.0,
        input_key: str | int | None = None,
        warmup_fraction: float = 0.0,
        check_every_n_epochs: int | None = 1,
        seed: int = 0,
        total_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if attack == "fgsm" and steps not in (None, 1):
            raise ValueError(f"steps must be None or 1 with attack='fgsm'; got {steps}. Use attack='pgd' for more.")
        number = 1 if attack == "fgsm" else _PGD_STEPS if steps is None else steps
        self._attack = Attack(epsilon, number, step_size, norm, random_start, bounds, mean, std)
        self.epsilon = epsilon
        self.attack = attack
        self.steps = steps
        self.step_size = step_size
        self.norm = norm
        self.random_start = random_start
        self.bounds = bounds
        self.mean = mean
        self.std = std
        self.clean_fraction = check_share(clean_fraction, "clean_fraction")
        self.input_key = input_key
        self.warmup_fraction = check_between(warmup_fraction, 0.0, 1.0, "warmup_fraction")
        self.check_every_n_epochs = check_count(check_every_n_epochs, 1, "check_every_n_epochs")
        self.seed = check_count(seed, 0, "seed")
        self.total_steps = check_total_steps(total_steps)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.fitting:
            return
        refuse_dataloader_iter(pl_module.training_step, self.display_name)
        self._refuse_another(trainer)
        around = partial(self._around, trainer)
        self.undo.push(wrap_method(pl_module, "training_step", around, order=WrapOrder.INPUTS))

    def _refuse_another(self, trainer: pl.Trainer) -> None:
        others = [callback for callback in trainer.callbacks if isinstance(callback, AdversarialTraining)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise ValueError(
                f"{' and '.join(other.display_name for other in others)} would attack each other's inputs. Use only "
                "one of them per Trainer."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        words = f"trains on inputs attacked by {self.attack.upper()} ({self._attack.described})"
        self.announce(words if self.epsilon else "trains on unchanged inputs, because epsilon is 0", "inputs")

    @override
    def chosen(self) -> Chosen:
        """Return the inputs that are attacked; none before the first batch."""
        return replace(super().chosen(), names=[] if self._place is None else self._place.names)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.warmup_fraction and total_steps(trainer, self.display_name, self.total_steps) is None:
            self.say(IN_FIRST_EPOCH)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._attacked = None
        if self._logged:
            self.log_scalars(pl_module, self._logged)
            self._logged = {}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epsilon and self.check_every_n_epochs and (trainer.current_epoch + 1) % self.check_every_n_epochs == 0:
            found = self._overfitting.run(trainer)
            log_many(trainer, {self.log_key(name): accuracy for name, accuracy in found.items()})
        self._overfitting.forget()

    # Inside the step.

    def _around(self, trainer: pl.Trainer, inner: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``training_step`` on attacked inputs; on clean ones outside of training and inside ``quiet``."""

        def run(shown: Any) -> Any:
            return inner(shown, *args, **kwargs)

        share = self._share(trainer)
        # A validation_step may call training_step too, which must see clean inputs.
        if share == 0.0 or not trainer.training or is_quiet(trainer.lightning_module):
            return run(batch)
        try:
            place, inputs = self._attacked_inputs(trainer, batch, run, share)
        except NoLossError:  # the module skips this batch
            return run(batch)
        if self.check_every_n_epochs is not None:
            self._overfitting.keep(place, batch, args, kwargs)
        with place.shown(batch, inputs) as shown:
            output = run(shown)
        if not is_repeated(trainer.lightning_module):
            self._keep_for_log(trainer, output, share)
        return output

    def _share(self, trainer: pl.Trainer) -> float:
        """Return the share of epsilon at this point of the warm-up."""
        if self.epsilon == 0.0 or self.warmup_fraction == 0.0:
            return float(self.epsilon > 0.0)
        return min(1.0, run_progress(trainer, stated=self.total_steps) / self.warmup_fraction)

    def _attacked_inputs(self, trainer: pl.Trainer, batch: Any, run: Run, share: float) -> tuple[Place, Tensor]:
        """Return the place of the inputs and the attacked inputs, which are the same if the step is evaluated again."""
        position = (trainer.current_epoch, trainer.fit_loop.batch_idx)
        # Compare tensors, because DDP on a GPU passes them in new containers.
        if self._attacked is not None:
            is_again = self._attacked[0] == position and same_tensors(self._attacked[1], batch)
            if is_again or is_repeated(trainer.lightning_module):
                return self._attacked[2]  # LBFGS or SAM evaluates its closure again: the objective must not change
        pl_module, is_first = trainer.lightning_module, self._place is None
        place = self._place = self._place or find_place(pl_module, batch, self.input_key, self.display_name)
        way_out = f", or train without {self.display_name}"
        with quiet(trainer, pl_module, evaluate=False, check=is_first, advice=way_out, display_name=self.display_name):
            clean = place.inputs(batch, run)
            if is_first:
                self._attack.refuse_inputs(clean, self.display_name)
            self._start_loss = None
            generator = generator_for(clean.device, self.seed, "/".join(map(str, (*position, trainer.global_rank))))
            loss_of = attack_losses(trainer, place, batch, run, self._note_start)
            try:
                attacked = self._attack(loss_of, clean, generator, place.support(batch), share)
            except IndependentLossError as error:
                raise refused(error, self.display_name) from None
            except Exception as error:
                if not isinstance(error, NoLossError):
                    error.add_note(
                        f"{self.display_name} ran training_step on an input that requires a gradient, to attack it."
                    )
                raise
            inputs = _with_clean_samples(attacked, clean, self.clean_fraction, generator)
        self._attacked = (position, batch, (place, inputs))
        return place, inputs

    # What is logged.

    def _note_start(self, loss: Tensor) -> None:
        if self._start_loss is None:
            self._start_loss = loss.detach().mean()

    def _keep_for_log(self, trainer: pl.Trainer, output: Any, share: float) -> None:
        loss = loss_of_output(output)
        if loss is not None and self._start_loss is not None and is_log_step(trainer):
            self._logged = {"epsilon": share * self.epsilon, "loss_gain": loss.detach().mean() - self._start_loss}


def _with_clean_samples(attacked: Tensor, clean: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Return attacked inputs with a random share of clean samples; their number is rounded down."""
    count = int(fraction * len(clean) * (1 + 1e-12))  # 0.29 * 100 is 28.999999999999996
    if count == 0:
        return attacked
    rows = torch.rand(len(clean), generator=generator, device=clean.device).argsort()[:count]
    return attacked.index_copy(0, rows, clean.index_select(0, rows))
