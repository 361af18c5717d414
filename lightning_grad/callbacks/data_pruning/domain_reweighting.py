"""Domain reweighting: weights of domains by ``functional/data_pruning/domain_reweighting.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks.data_pruning._domains import Domains, check_domains, find_domains
from lightning_grad.callbacks.data_pruning._drawn_samples import DrawnSamples
from lightning_grad.callbacks.data_pruning._target import TargetSet, trained_parameters
from lightning_grad.callbacks.data_pruning._weighting import LossWeighting
from lightning_grad.callbacks.data_pruning._works_with import COMPILED, no_weighting
from lightning_grad.core.compatibility import WHOLE_WEIGHTS, Compatibility, manual, no
from lightning_grad.core.fit import during_fit, until_next_fit
from lightning_grad.core.losses.given_functions import LOSS_FN
from lightning_grad.core.losses.rehearsal import Rehearsal
from lightning_grad.core.losses.sample_losses import SampleLosses
from lightning_grad.core.record import RunRecord, panels, style_axis
from lightning_grad.core.subset import SubsetCallback
from lightning_grad.functional import gradient_alignments, update_domain_weights
from lightning_grad.utilities.checks import check_between, check_count, check_finite_at_least, check_share
from lightning_grad.utilities.reporting import is_log_step, listed, stepped_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BY_HAND = (
    "weight the losses in training_step with lightning_grad.functional.gradient_alignments and update_domain_weights"
)
_MOST_LOGGED = 32  # domains whose weights are logged; the table of the run has all
_MOST_DRAWN = 10
_SUM = 1e-6  # tolerance of the sum of given weights


class DomainReweighting(LossWeighting):
    r"""Weight the domains of the training data by how well their gradients agree with that of a small target set (DGA).

    .. math::
        a_i = \frac{\langle g_i, g^* \rangle}{\lVert g^* \rVert \sqrt{\frac 1 k \sum_j \lVert g_j \rVert^2}}, \qquad
        \alpha_i \leftarrow \frac{\alpha_i e^{\eta a_i}}{\sum_j \alpha_j e^{\eta a_j}}, \qquad
        \bar\alpha \leftarrow \beta \bar\alpha + (1 - \beta) \alpha, \qquad
        w_b = \frac{\bar\alpha_{d(b)}}{s_{d(b)}}

    Every ``every_n_steps`` steps, g_i is the gradient of the mean loss of some samples of domain i, and g* that of samples
    of the target, both by the module's own ``training_step`` in eval mode. The loss of sample b of domain d(b) then has the
    weight w_b, where s_i is the share of domain i in the data. So the expected gradient is that of training on the mixture
    :math:`\bar\alpha`, and the mean weight is about 1. Weights begin at the shares: the run begins as the plain one.

    Args:
        domains: Names of the parts of a ConcatDataset, indices by name, or a function of the data set.
            The function, by dotted path in YAML, takes the training set and returns the domain of each sample: a name, a
            number, or None for none. Samples without a domain keep the weight 1.
        target: Callable (trainer) -> DataLoader or data set of target samples. Default: the validation loader.
            The validation loss then no longer measures new data. In YAML, write its dotted path.
        eta: Step size of the weights, at least 0; 0 keeps them (0.5 is our choice).
            With normalize, a weight changes by at most about a factor of exp(eta sqrt(k)) in an update.
        every_n_steps: Optimizer steps between two updates of the weights (T_r of the paper).
            50 is our choice; an update costs about as much as one step for each domain and one for the target.
        samples: Samples of each domain, and of the target, in an update; smaller sets are used whole.
        smoothing: Beta, the part of the mean weights that an update keeps, at least 0 and below 1.
        floor: Smallest weight w of a domain's losses, from 0 to 1, so a domain can return (0.05 is our choice).
        normalize: Whether to divide inner products by the norms of the gradients; False is the rule of the paper.
            Without it, the right eta depends on the scale of the loss, and updates shrink as gradients do.
        initial: Share of each domain in the first mixture, by name. Default: its share in the data.
            With eta=0, this is a fixed mixture.
        loss_index: Index, from 0, of the only loss call that counts. Default: the whole loss.
        loss_fn: Callable (module, batch) -> losses of shape (B,), used instead of the step's loss.
            Its mean must equal the loss of the step, up to a constant. The step still runs, so this costs a
            second forward and backward pass.
        seed: Seed of the choice of samples for updates.
        loader_key: Key or list position of the training loader, if there are several.
        figure: Draw the weights over the run at its end (needs matplotlib and a logger with a folder).
        name: Name of this instance.

    Raises:
        ValueError: In the constructor for numbers outside their range, or fewer than two domains. In setup for sharded
            strategies, manual optimization, or another technique that weights samples or adds to the loss. Before the
            first batch, if the domains do not fit the data, or the target has another form than the training batches.
            In the first step if it returns no loss.
        TypeError: Before the first batch, if the training data or the target has no indices (iterable data).
        InseparableLossError: In the first step, if its loss is not a sum of one term per sample, or a learned factor
            multiplies it.
        RuntimeError: After the first batch, if rows of a loss cannot be assigned to samples.

    **Hooks.** Weights are updated in ``on_train_batch_start``, without a trace in the run. Losses are read inside
    ``training_step`` and weighted in its backward pass. The step still returns and logs the unweighted loss.

    **Logs** under ``data/``, at log steps: ``weight/NAME``, the share of a domain in the mixture; once they have changed,
    ``mean_weight`` of the batch, ``loss`` and ``weighted_loss`` (the mean loss of the batch without and with weights). At the
    end: a table with the weights and alignments of all updates, and a figure.

    **State.** The weights, the rows of the table, and the step of the last update; resuming is bit-exact.

    **Cost.** For k domains, an update runs ``samples * (k + 1)`` samples forward and backward, in batches; ranks share them.
    It holds up to three gradients of the trained parameters. Other steps read the loss, as in :class:`InfoBatch`.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.DomainReweighting
                  init_args:
                    domains: [web, code, books]

    References:
        Fan, Grangier and Ablin, "Dynamic Gradient Alignment for Online Data Mixing", 2024, arXiv 2410.02498. It draws
        samples from the mixture; here their losses have its weights, so the loader stays yours. Normalized products and the
        floor are ours.
    """

    namespace: ClassVar[str] = "data"
    compatibility: ClassVar[Compatibility] = SubsetCallback.compatibility.but(
        compiled=COMPILED,
        complex_parameters=no("compares real gradients, and {} is complex", "Store it as real and imaginary part"),
        **manual(no_weighting(f"Use automatic optimization, or {_BY_HAND}")),
        **WHOLE_WEIGHTS,
    )
    trial: ClassVar[Mapping[str, Any]] = {
        "domains": {"first": [0, 1, 2, 3], "second": [4, 5, 6, 7]},
        "every_n_steps": 2,
        "samples": 4,
    }
    neutral: ClassVar[Mapping[str, Any] | str] = {"eta": 0.0}
    fixed_settings: ClassVar[Mapping[str, str]] = {"domains": "its weights belong to these domains"}
    syncs_per_step: ClassVar[str] = (
        "the host must know the gradients' products: one update every every_n_steps optimizer steps"
    )
    of_batch: ClassVar[tuple[str, ...]] = (*LossWeighting.of_batch, "_drawn")
    changes_shares: ClassVar[bool] = True
    way_out: ClassVar[str] = f"{_BY_HAND}, or {LOSS_FN}"

    record = until_next_fit.of(RunRecord).saved()
    _names = until_next_fit.of(list[str]).saved()
    _raw = until_next_fit.of(list[float]).saved()  # alpha, by domain
    _mixture = until_next_fit.of(list[float]).saved()  # their moving mean, which the losses get
    _updated_at = until_next_fit.of(int).saved()  # step of the last update; 0 before the first
    _samples = during_fit[DrawnSamples]()
    _domains = during_fit[Domains]()
    _factors = during_fit[Tensor | None](lambda _: None)  # w of each domain, then 1 for samples of none
    _drawn = during_fit.of(list[int])
    _is_rehearsed = during_fit.of(bool)

    def __init__(
        self,
        domains: Sequence[str] | Mapping[str, Sequence[int]] | Callable[[Any], Any],
        target: Callable[[pl.Trainer], Any] | None = None,
        eta: float = 0.5,
        every_n_steps: int = 50,
        samples: int = 64,
        smoothing: float = 0.5,
        floor: float = 0.05,
        normalize: bool = True,
        initial: Mapping[str, float] | None = None,
        loss_index: int | None = None,
        loss_fn: Callable[[pl.LightningModule, Any], Any] | None = None,
        seed: int = 0,
        loader_key: str | int | None = None,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        check_domains(domains)
        self.domains, self.target = domains, target
        self.eta = check_finite_at_least(eta, 0.0, "eta")
        self.every_n_steps = check_count(every_n_steps, 1, "every_n_steps")
        self.samples = check_count(samples, 1, "samples")
        self.smoothing = check_share(smoothing, "smoothing")
        self.floor = check_between(floor, 0.0, 1.0, "floor")
        self.normalize = normalize
        self.initial = None if initial is None else dict(initial)
        if initial is not None and (min(initial.values(), default=-1.0) < 0.0 or abs(sum(initial.values()) - 1) > _SUM):
            raise ValueError(f"initial must have shares of at least 0 with the sum 1; got {self.initial}.")
        self.choose_loss(loss_index, loss_fn)
        self.seed = check_count(seed, 0, "seed")
        self.loader_key = loader_key
        self.figure = figure
        self.acts = self.eta > 0.0 or initial is not None

    @override
    def needs_losses(self) -> bool:
        return self._updated_at > 0 or self.initial is not None

    @override
    def samples_of(self, batch: Any) -> int:
        return len(self._samples.of_batch(self._drawn))

    # The fit begins.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fitting:
            self._samples = DrawnSamples(trainer, self.display_name, self.undo, self.loader_key)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.works_with().refuse_parameters(self.display_name, pl_module)
        self._samples.begin()
        words = "keeps the weights of the domains (eta=0)"
        if self.eta > 0.0:
            words = f"weights domains by their gradients, every {self.every_n_steps} steps"
        self.announce(words, "losses", ["training_step"] if self.acts else [])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples.resume()
        found = self._samples.training_set
        self._domains = find_domains(self.domains, found.loader.dataset, found.sampler.population, self.display_name)
        names = self._domains.names
        if self._names and self._names != names:
            raise ValueError(
                f"{self.display_name} resumes with weights of {listed(self._names)}, but the domains are {listed(names)}. "
                "Resume with the same training set."
            )
        if not self._names:
            self._names, self._raw = names, self._first_mixture(names)
            self._mixture = list(self._raw)
        if self.eta > 0.0:
            self._target.check()
            self._alignments(0)  # raises now what would end the first update

    def _first_mixture(self, names: list[str]) -> list[float]:
        if self.initial is None:
            return self._domains.shares
        if set(self.initial) != set(names):
            raise ValueError(
                f"{self.display_name}(initial=...) must have one share for each of the domains {listed(names)}; got "
                f"{listed(self.initial)}."
            )
        return [float(self.initial[name]) for name in names]

    @during_fit
    def _target(self) -> TargetSet:
        """The target, whose samples are read as training batches."""
        return self._reader(self.target)

    @during_fit
    def _own(self) -> TargetSet:
        """The training set, read in the same way."""
        dataset = self._samples.training_set.loader.dataset
        return self._reader(lambda trainer: dataset)

    def _reader(self, source: Callable[[pl.Trainer], Any] | None) -> TargetSet:
        found = self._samples.training_set
        return TargetSet(
            self._module.trainer, self._module, self.asked, found.loader, source, found.is_whole_batch, self.seed
        )

    # A batch.

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples.begin_epoch()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._drawn = self._samples.draw(batch_idx)
        step = stepped_batches(trainer)
        if self.eta > 0.0 and step > self._updated_at and step % self.every_n_steps == 0:
            self._update(step)
            self.record.save(trainer, self)

    def _update(self, step: int) -> None:
        alignments = self._alignments(step)
        raw, mixture = (torch.tensor(each, dtype=torch.float64) for each in (self._raw, self._mixture))
        shares = torch.tensor(self._domains.shares, dtype=torch.float64)
        raw = update_domain_weights(raw, alignments, self.eta, shares, self.floor)
        self._raw, self._mixture = raw.tolist(), mixture.lerp(raw, 1.0 - self.smoothing).tolist()
        self._updated_at, self._factors = step, None
        values = {"weight": self._mixture, "alignment": alignments.tolist()}
        row = {f"{kind}/{name}": each for kind in values for name, each in zip(self._names, values[kind], strict=True)}
        self.record.add({"step": step, **row})

    def _alignments(self, step: int) -> Tensor:
        """Return the alignment of each domain with the target, (k,), on the CPU; all ranks return the same."""
        parameters = trained_parameters(self._module, None, self.display_name)
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step)

        def some(total: int) -> list[int]:
            return torch.randperm(total, generator=generator)[: self.samples].sort().values.tolist()

        target = self._target.mean_gradient(parameters, some(len(self._target)))

        def of_domains() -> Iterator[list[Tensor]]:
            for members in self._domains.members:
                chosen = [members[place] for place in some(len(members))]
                yield list(self._own.mean_gradient(parameters, chosen).values())

        return gradient_alignments(of_domains(), list(target.values()), self.normalize).cpu()

    @override
    def weigh(self, losses: SampleLosses) -> Tensor | None:
        device = losses.losses.device
        if self._factors is None or self._factors.device != device:
            pairs = zip(self._mixture, self._domains.shares, strict=True)
            self._factors = torch.tensor([*(mixed / share for mixed, share in pairs), 1.0], device=device)
        # Samples of no domain have the number -1, so the last factor.
        numbers = self._domains.of_sample[torch.tensor(self._samples.of_batch(self._drawn))]
        return self._factors[numbers.to(device)]

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.acts and not self._is_rehearsed:
            self._is_rehearsed = True
            rehearsal = Rehearsal(trainer, pl_module, self.asked, self._samples.training_set, by_terms=True)
            rehearsal.check_loader(in_training=self.loss_fn is None)
            self.learn_sample_loss(rehearsal)
        if self.acts and is_log_step(trainer):
            logged = dict(zip(self._names[:_MOST_LOGGED], self._mixture, strict=False))
            self.log_scalars(pl_module, {f"weight/{name}": value for name, value in logged.items()})
        super().on_train_batch_end(trainer, pl_module, *args)

    # The fit ends.

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.acts:
            final = zip(self._names[:_MOST_LOGGED], self._mixture, strict=False)
            summary = {f"weight/{name}": value for name, value in final}
            self.record.report(trainer, self, self._draw, summary=summary)

    def _draw(self) -> Figure:
        """Draw the weights and the alignments of the domains with the largest final weights. Needs matplotlib."""
        order = sorted(range(len(self._names)), key=lambda number: -self._mixture[number])[:_MOST_DRAWN]
        more = f" ({len(order)} of {len(self._names)})" if len(order) < len(self._names) else ""
        figure, axes = panels(f"{self.display_name}: weights of the domains{more}", [2.8, 2.0])
        for place, number in enumerate(order):
            name, color = self._names[number], f"C{place}"
            for axis, kind in zip(axes, ("weight", "alignment"), strict=True):
                steps, values = self.record.series(f"{kind}/{name}")
                axis.plot(steps, values, "o-", color=color, markersize=3.0, linewidth=1.4, label=name)
            axes[0].axhline(self._domains.shares[number], color=color, linewidth=0.8, linestyle=":")
        axes[0].set_ylim(0.0, 1.0)
        axes[0].set_ylabel("share in the mixture\n(dotted: in the data)")
        axes[1].axhline(0.0, color="0.4", linewidth=0.8)
        axes[1].set_ylabel("alignment\nwith the target")
        axes[1].set_xlabel("step")
        axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        for axis in axes:
            style_axis(axis)
        return figure
