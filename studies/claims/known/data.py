"""Less data: InfoBatch, random subsets and chosen subsets at equal numbers of seen samples; samples drawn by gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_grad.callbacks import DataPruning, GradientNormSampling, InfoBatch, RepeatedRandomSubset
from lightning_grad.core import SubsetCallback
from studies.arms import PLAIN, Arm, OfEpochs, Use
from studies.claim import Paper
from studies.on_task import OnTask
from studies.tasks import TASKS

RATES, SCORED = (0.01, 0.03, 0.1, 0.3), 0.25  # share of the epochs before the samples are scored
IMAGES: Mapping[str, Any] = TASKS["images"].metric


def chosen(prune: float, **options: Any) -> Arm:
    """Return a training that scores all samples after a quarter of its epochs, and then sees a part of them.

    It has as many steps as a training on all samples would have with the seen number of samples in an epoch.
    """
    return Arm(Use(DataPruning, prune, epoch=OfEpochs(SCORED), figure=False, num_shown=0, **options))


def arms(prune: float) -> dict[str, Arm]:
    """Return the selections that drop a share of the samples; RS2 sees as many samples in all as the others."""
    return {
        "random": chosen(prune, keep="random"),
        "rs2": Arm(Use(RepeatedRandomSubset, round(prune * (1 - SCORED), 4))),
        "el2n": chosen(prune),
        "grand": chosen(prune, score="grand"),
        "ccs": chosen(prune, offset=0.1, select="ccs"),
        "dq": chosen(prune, select="dq", balance="class"),
    }


def pruning(part: str, prune: float, flip: float) -> OnTask:
    """Return the claim about a part of the data, with a share of wrong labels."""
    scored = ("el2n", "grand", "ccs", "dq")
    wrong = f", with {100 * flip:g} % wrong labels" if flip else ""
    return OnTask(
        name=f"pruning-{part}{'-wrong-labels' if flip else ''}-images",
        text=f"After a quarter of the epochs{wrong}, the {part} of the data chosen by EL2N, GraNd, CCS or Dataset "
        f"Quantization is better than a random {part}, and than RS2 with as many seen samples.",
        paper=Paper(
            "`DataPruning`",
            "data_pruning",
            "Half of CIFAR-10 chosen by EL2N or GraNd is as good as all of it; at high rates, they are worse than a random "
            "choice, and CCS and Dataset Quantization are better.",
            "Deep Learning on a Data Diet (2107.07075); Coverage-centric Coreset Selection (2210.15809); "
            "Dataset Quantization (2308.10524)",
        ),
        table=arms(prune),
        arms=("random", "rs2", *scored),
        reference="random",
        pairs=[(arm, other) for other in ("random", "rs2") for arm in scored],
        flip=flip,
        rates=RATES,
        budget=6,
        **IMAGES,
    )


class UniformDraws(SubsetCallback):
    """Draws as many samples as there are, with replacement, in each epoch but the first, like GradientNormSampling.

    Args:
        seed: Seed of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    @override
    def choose_samples(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        population, epoch = self.training_set.sampler.population, trainer.current_epoch
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        drawn = torch.randint(len(population), (len(population),), generator=generator)
        return population[drawn] if epoch else None


CLAIMS = (
    OnTask(
        name="infobatch-images",
        text="InfoBatch is at most one point less accurate than all samples, with fewer steps.",
        paper=Paper(
            "`InfoBatch`",
            "data_pruning",
            "Dropping well-learned samples at random, and weighting the rest, saves a fifth to two fifths without loss.",
            "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning (2303.04947)",
        ),
        table={"all": PLAIN, "infobatch": Arm(Use(InfoBatch))},
        arms=("all", "infobatch"),
        reference="all",
        rates=RATES,
        margin=-0.01,
        budget=3,
        **IMAGES,
    ),
    OnTask(
        name="rs2-images",
        text="With as many seen samples, fresh random subsets (RS2) are better than all samples and then one random half.",
        paper=Paper(
            "`RepeatedRandomSubset`",
            "data_pruning",
            "A new random subset in each epoch beats fixed subsets at the same number of seen samples.",
            "Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning (2305.18424)",
        ),
        table=arms(0.5),
        arms=("random", "rs2"),
        reference="random",
        rates=RATES,
        budget=3,
        **IMAGES,
    ),
    pruning("half", 0.5, 0.0),
    pruning("fifth", 0.8, 0.0),
    pruning("half", 0.5, 0.1),
    pruning("fifth", 0.8, 0.1),
    OnTask(
        name="gradient-norm-sampling-images",
        text="With as many steps, samples drawn by gradient norms, with unbiased weights, are better than uniform draws with "
        "replacement, and than all samples in each epoch.",
        paper=Paper(
            "`GradientNormSampling`",
            "data_pruning",
            "Drawing samples in proportion to their gradient norms lowers the variance of the gradient, and trains better.",
            "PA&DA: Jointly Sampling PAth and DAta for Consistent NAS (2302.14772)",
        ),
        table={
            "all": PLAIN,
            "uniform draws": Arm(Use(UniformDraws)),
            "gradient norms": Arm(Use(GradientNormSampling)),
        },
        arms=("all", "uniform draws", "gradient norms"),
        reference="uniform draws",
        pairs=[("gradient norms", "uniform draws"), ("gradient norms", "all")],
        rates=RATES,
        budget=4,
        **IMAGES,
    ),
)
