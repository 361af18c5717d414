"""Train on inputs that are attacked again in each step, in seconds.

::

    python examples/adversarial.py
    python examples/adversarial.py --epsilon 0.1 --epochs 40

The list of callbacks in :func:`train` does it. The project that is trained, ``plain_project``, knows nothing of
lightning-grad. ``studies/adversarial.py`` compares attacks and schedules.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ResidualConvNet

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining


def train(epsilon: float, epochs: int, output: Path) -> dict[str, float]:
    """Train a small residual network under attack, and return what was logged last."""
    seed_everything(0, verbose=False)
    data = Digits(batch_size=128)
    data.setup("fit")
    pixels: dict[str, Any] = {"bounds": (0, 1), "mean": data.mean, "std": data.std}  # so epsilon counts in pixels
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=[
            AdversarialTraining(epsilon, **pixels),
            AdversarialEvaluation(epsilon, steps=10, **pixels),
            AccuracyGradientLR("adversarial/val_acc"),
        ],
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(ResidualConvNet(width=8, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="constant"), data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once, as the command line says."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.15, help="by how much a pixel may be changed")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/adversarial"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.epsilon, given.epochs, given.output)
    print(f"Accuracy: {100 * logged['val_acc']:.1f} %, under attack {100 * logged['adversarial/val_acc']:.1f} %")
    print(f"Written to {given.output}/: accuracy_gradient_lr.png, accuracy_gradient_lr.csv, metrics.csv.")


if __name__ == "__main__":
    main()
