"""Measure the curvature of the loss: the largest eigenvalues of its Hessian, their sum and their density."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from lightning_grad.callbacks.diagnostics._curvature_figures import draw_density, draw_run
from lightning_grad.core import (
    WHOLE_WEIGHTS,
    Compatibility,
    ProbeCallback,
    ProbeLook,
    Reading,
    RunRecord,
    check_count,
    manual,
    no,
    yes,
)
from lightning_grad.core.losses.sample_losses import trained_loss
from lightning_grad.core.probe_samples import Split
from lightning_grad.functional import (
    HessianProduct,
    Ritz,
    hutchinson_trace,
    lanczos,
    largest_eigenvalues,
    random_signs,
    spectral_density,
    stability_edge,
)
from lightning_grad.functional.plain_tensors import plain_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_SECOND_DERIVATIVE = ("is not implemented", "once_differentiable", "not differentiable")


class HessianSpectrum(ProbeCallback):
    r"""Measure the curvature of the training loss: largest eigenvalues, trace and density of the Hessian.

    .. math::
        H = \nabla_\theta^2 \frac 1 n \sum_{i=1}^n \ell_i(\theta), \qquad
        \operatorname{tr} H \approx \frac 1 m \sum_{j=1}^m z_j^T H z_j

    The loss is that of the module's own ``training_step`` on n fixed training samples, in eval mode, over all parameters that
    require grad. H is never stored: the Lanczos iteration finds the eigenvalues by products :math:`H v`. With plain gradient
    descent, training is unstable where the largest eigenvalue exceeds :math:`2 / \eta`, the edge of stability.

    Args:
        num_eigenvalues: Number of the largest eigenvalues to log, each as often as it occurs.
        probes: Random vectors z of the trace; 0 for no trace.
        density: Draw the density of all eigenvalues, from the same Lanczos iteration.
        samples: Number of samples n, spread evenly over the set, or their indices.
        every_n_epochs: Look at the end of every n-th epoch. Default: 1.
        every_n_steps: Look after every n-th optimizer step instead.
        lanczos_steps: Largest number of products for the eigenvalues.
            The iteration ends earlier, but not before 10, when the largest ones have a relative error below 1e-4.
        split: Set that the samples are from, "train" or "val".
        dataset: Callable (trainer) -> data set to read from, for example one without augmentation.
        loader_key: Key or list position of the loader to use, if there are several.
        seed: Seed of the random vectors, which are the same in each look.
        figure: Draw figures (needs matplotlib and a logger with a folder).
        name: Name of this instance, needed if two are used; part of state and log keys.

    Raises:
        ValueError: In the constructor for wrong arguments. In ``setup`` for sharded strategies and manual optimization. After
            the first batch, if there are fewer samples, or the step returns no loss that requires a gradient.
        RuntimeError: After the first batch, if a part of the module has no second derivative, or uses a reentrant activation
            checkpoint.

    **Hooks.** Those of :class:`~lightning_grad.core.ProbeCallback`.

    **Logs** under ``curvature/``, in each look: ``eigenvalue_1``, ``eigenvalue_2`` ..., the largest first; ``eigenvalue_min``;
    ``eigenvalue_error``, a bound of the error of the logged largest ones; ``trace`` and ``trace_error``, its standard error;
    ``stability_edge`` with SGD; the image ``density``. At the end: the figure of the run and a table.

    **State.** The scalars of all looks, the density of up to eight looks, and whether a look is due.

    **Cost.** One gradient of n samples with a graph that is kept, and one backward pass through that graph for each product:
    up to ``lanczos_steps + probes`` of them, and with several eigenvalues ten or more to find those that occur repeatedly.
    Memory: that graph, and one vector of the size of the weights for each product of the Lanczos iteration. See
    docs/benchmarks.md.

    **Deviations.** The density comes from one random vector instead of an average over several, as in arXiv 1901.10159: the
    error of one falls with the number of weights.

    Example:
        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_grad.callbacks.HessianSpectrum
                  init_args:
                    num_eigenvalues: 3
                    samples: 100

    References:
        Sagun et al., "Empirical Analysis of the Hessian of Over-Parametrized Neural Networks", 2017, arXiv 1706.04454.
        Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", 2019,
        arXiv 1901.10159 (density by the Lanczos iteration).
        Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability", 2021, arXiv 2103.00065.
    """

    namespace: ClassVar[str] = "curvature"
    way_out: ClassVar[str] = "return the loss from training_step"
    looks_on_all_ranks: ClassVar[bool] = True  # the step may gather tensors from all ranks
    compatibility: ClassVar[Compatibility] = ProbeCallback.compatibility.but(
        compiled=yes("Compiled modules run eagerly in a look."),
        sparse_gradients=no("differentiates gradients, and {} has sparse ones", "Set sparse=False for it"),
        complex_parameters=no(
            "measures curvature in real parameters, and {} is complex", "Store it as real and imaginary part"
        ),
        **manual(
            no(
                "differentiates the loss that training_step returns, and under {} it steps the optimizers itself",
                "Use automatic optimization, or HessianProduct and lanczos of lightning_grad.functional in your own loop",
            )
        ),
        **WHOLE_WEIGHTS,
    )
    trial: ClassVar[Mapping[str, Any]] = {"samples": 8, "probes": 2, "lanczos_steps": 10}

    def __init__(
        self,
        num_eigenvalues: int = 3,
        probes: int = 10,
        density: bool = True,
        samples: int | Sequence[int] = 100,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        lanczos_steps: int = 60,
        split: Split = "train",
        dataset: Callable[[pl.Trainer], Any] | None = None,
        loader_key: str | int | None = None,
        seed: int = 0,
        figure: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(samples, every_n_epochs, every_n_steps, split, dataset, loader_key, figure, name)
        self.num_eigenvalues = check_count(num_eigenvalues, 1, "num_eigenvalues")
        self.probes = check_count(probes, 0, "probes")
        self.density = density
        self.lanczos_steps = check_count(lanczos_steps, 2, "lanczos_steps")
        self.seed = check_count(seed, 0, "seed")
        if lanczos_steps < num_eigenvalues:
            raise ValueError(
                f"lanczos_steps must be at least num_eigenvalues={num_eigenvalues}; got {lanczos_steps}. Each step adds "
                "one approximate eigenvalue."
            )

    # A look.

    @override
    def probe(self, look: ProbeLook) -> Reading:
        parameters = [parameter for parameter in look.pl_module.parameters() if parameter.requires_grad]
        # The dtype and device of all.
        like = torch.cat([plain_tensor(parameter.detach()).flatten()[:1] for parameter in parameters])
        like = like.to(torch.promote_types(like.dtype, torch.float32))
        try:
            with sdpa_kernel(SDPBackend.MATH):  # other kernels have no second derivative; checkpoints run again later
                hessian = HessianProduct(self._loss(look), parameters)
                product = self._shared(hessian, look)
                vectors = self._vectors(hessian.size, like)
                found = lanczos(product, next(vectors), self.lanczos_steps, self.num_eigenvalues)
                scalars = self._eigenvalues(product, found)
                if self.probes:
                    scalars["trace"], scalars["trace_error"] = hutchinson_trace(product, vectors)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
                raise
            raise RuntimeError(
                f"{self.display_name} needs second derivatives, but an operation of {type(look.pl_module).__name__} has "
                f"none: {str(error).splitlines()[0]} If the module chooses a kernel of attention itself, choose "
                "SDPBackend.MATH in eval mode; otherwise drop the callback."
            ) from None
        scalars |= self._edge(look)
        return self._with_density(found, hessian.size, scalars, look) if self.density else Reading(scalars)

    def _with_density(self, found: Ritz, size: int, scalars: Mapping[str, float], look: ProbeLook) -> Reading:
        at, values = spectral_density([found])
        kept = {"at": at.float(), "density": values.float(), "size": torch.tensor(size)}
        if not self.figure:
            return Reading(scalars, kept=kept)
        largest = [scalars[name] for name in scalars if name.startswith("eigenvalue_") and name[11:].isdecimal()]
        title = f"{self.display_name}, epoch {look.epoch}, step {look.step}: density of {size:,} eigenvalues"
        drawn = partial(draw_density, at, values, size, largest, scalars.get("stability_edge"), title)
        return Reading(scalars, pictures={"density": drawn}, kept=kept)

    def _loss(self, look: ProbeLook) -> Tensor:
        """Return the mean loss of the samples, with its graph."""
        count, total = len(look.indices), torch.zeros(())
        with torch.enable_grad():
            for part in look.parts():
                ways_out = f"{self.display_name} differentiates it. {look.asked.advice}"
                loss = trained_loss(part.run(), ways_out).squeeze()
                total = total.to(loss) + loss * (len(part.indices) / count)
        if not bool(total.isfinite()):
            raise ValueError(f"{self.display_name} found no curvature, because the loss is {float(total.detach())}.")
        return total

    def _shared(self, product: HessianProduct, look: ProbeLook) -> Callable[[Tensor], Tensor]:
        """Average products over ranks, so all take the same number of them: each may run collectives of the step."""
        return lambda vector: cast(Tensor, look.trainer.strategy.reduce(product(vector), reduce_op="mean"))

    def _vectors(self, size: int, like: Tensor) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return (random_signs(size, generator, like) for _ in range(1 + self.probes))

    def _eigenvalues(self, product: Callable[[Tensor], Tensor], found: Ritz) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed + 1)  # the vectors of the trace stay the same in each look
        largest, errors = largest_eigenvalues(product, found, self.num_eigenvalues, generator, self.lanczos_steps)
        numbered = {f"eigenvalue_{number}": value for number, value in enumerate(largest, 1)}
        return {**numbered, "eigenvalue_min": float(found.values[0]), "eigenvalue_error": max(errors)}

    def _edge(self, look: ProbeLook) -> dict[str, float]:
        edges = [stability_edge(optimizer) for optimizer in look.trainer.optimizers]
        return {"stability_edge": edges[0]} if len(edges) == 1 and edges[0] is not None else {}

    @override
    def draw(self, record: RunRecord) -> Figure:
        return draw_run(record, self.kept_looks.kept, f"{self.display_name}: curvature of the training loss")
