"""Domains of the training data, weighted for a target."""

from __future__ import annotations

from lightning_grad.callbacks import DomainReweighting
from studies.arms import PLAIN, Arm, OfSteps, Use
from studies.claim import Paper
from studies.domains import DOMAINS, NAMES, OfDomains
from studies.tasks import TASKS

UPDATES = 0.05  # share of the steps between two updates


def mixture(*shares: float) -> Arm:
    """Return a training on a fixed mixture of the domains."""
    given = dict(zip(NAMES, shares, strict=True))
    return Arm(Use(DomainReweighting, NAMES, eta=0.0, initial=given, figure=False))


TABLE = {
    "plain": PLAIN,
    "uniform": mixture(*[1 / DOMAINS] * DOMAINS),
    "dga": Arm(Use(DomainReweighting, NAMES, every_n_steps=OfSteps(UPDATES), figure=False)),
    "match alone": mixture(1.0, *[0.0] * (DOMAINS - 1)),
}
CLAIMS = (
    OfDomains(
        name="domain-reweighting-images",
        text="With a planted domain that numbers the classes as the target does, and three that do not, DomainReweighting is "
        "better on the target than training on the data as it is, and than equal weights of the domains.",
        paper=Paper(
            "`DomainReweighting`",
            "data_pruning",
            "Domains weighted online by the alignment of their gradients with a small target set train a better specialist "
            "than fixed weights.",
            "Dynamic Gradient Alignment for Online Data Mixing (2410.02498)",
        ),
        table=TABLE,
        arms=tuple(TABLE),
        reference="plain",
        pairs=[("dga", "plain"), ("dga", "uniform")],
        rates=(0.01, 0.03, 0.1, 0.3),
        budget=8,
        **TASKS["images"].metric,
    ),
)
