"""Train a network on clean and on attacked images, and attack both. Takes seconds.

::

    python examples/adversarial.py
    python examples/adversarial.py --epsilon 0.1 --epochs 30

Only the callbacks in :func:`main` use lightning-grad; ``plain_project`` does not know it.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ImageClassifier
from torch import nn

from lightning_grad.callbacks import AccuracyGradientLR, AdversarialEvaluation, AdversarialTraining


def train(name: str, callbacks: list[Callback], data: Digits, epochs: int, output: Path) -> None:
    """Train a small network, and print its accuracy on clean and on attacked test images."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=callbacks,
        logger=CSVLogger(output, name=name, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    module = ImageClassifier(net, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="constant")
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    print(f"{name}: {tested['test_acc']:.1%} right, under attack {tested['adversarial/test_acc']:.1%}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train twice with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.15, help="largest change of a pixel, on a scale from 0 to 1")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training")
    parser.add_argument("--output", type=Path, default=Path("runs/adversarial"), help="folder of the results")
    given = parser.parse_args(arguments)
    data = Digits(batch_size=128)
    data.setup("fit")
    pixels: dict[str, Any] = {"bounds": (0, 1), "mean": data.mean, "std": data.std}  # so epsilon counts in pixels
    attacked = [AdversarialTraining(given.epsilon, **pixels), AccuracyGradientLR("adversarial/val_acc")]
    for name, own in (("usual", []), ("attacked", attacked)):
        train(name, [AdversarialEvaluation(given.epsilon, **pixels), *own], data, given.epochs, given.output)
    print(f"Written to {given.output}/, usual/ and attacked/: metrics.csv, accuracy_gradient_lr.png.")


if __name__ == "__main__":
    main()
