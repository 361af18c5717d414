"""Train on half of the samples from the fourth epoch on, and find mislabeled ones. Takes seconds.

::

    python examples/data_pruning.py
    python examples/data_pruning.py --prune 0 --score aum

Only the callback in :func:`train` uses lightning-grad; ``plain_project`` does not know it. A tenth of the training labels are
wrong here. ``studies/claims/data_pruning.py`` compares ways to choose samples.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ResidualConvNet

from lightning_grad.callbacks import DataPruning


def train(prune: float, score: Any, epochs: int, output: Path) -> float:
    """Train a small residual network with data pruning, and return its accuracy."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=[DataPruning(prune, score=score, epoch=3, offset=min(0.1, prune))],  # offset drops the hardest
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(ResidualConvNet(width=8), Digits(flip=0.1))
    return float(trainer.callback_metrics["val_acc"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prune", type=float, default=0.5, help="share of samples to drop")
    parser.add_argument("--score", default="el2n", help="score that ranks the samples: el2n, loss, margin, aum, ...")
    parser.add_argument("--epochs", type=int, default=16, help="epochs of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/data_pruning"), help="folder of the results")
    given = parser.parse_args(arguments)
    accuracy = train(given.prune, given.score, given.epochs, given.output)
    print(f"Validation accuracy: {100 * accuracy:.1f} %")
    print(f"Written to {given.output}/: data_pruning_epoch3_samples.png and .csv, data_pruning_epoch3_scores.png,")
    print("scores_epoch3.npz, metrics.csv and checkpoints/.")


if __name__ == "__main__":
    main()
