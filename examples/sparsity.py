"""Train a network whose encoder keeps 1 of every 8 weights. Takes seconds.

::

    python examples/sparsity.py
    python examples/sparsity.py --pattern 2:4 --recipe sr-ste

Only the callback in :func:`train` uses lightning-grad; ``plain_project`` does not know it.
``studies/claims/sparsity.py`` compares recipes with dense training.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, VisionTransformer

from lightning_grad.callbacks import NMSparsity
from lightning_grad.utilities import sparsity_report


def train(pattern: str, recipe: Any, epochs: int, output: Path) -> VisionTransformer:
    """Train a small sparse vision transformer, and return it."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=[NMSparsity(pattern, recipe)],
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = VisionTransformer()
    trainer.fit(module, Digits())
    print(f"Validation accuracy: {100 * float(trainer.callback_metrics['val_acc']):.1f} %")
    return module


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once, and print the density of each weight."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pattern", default="1:8", help="N:M, at most N nonzero weights in each group of M")
    parser.add_argument("--recipe", default="mdgf-exponential", help="recipe of the sparse training")
    parser.add_argument("--epochs", type=int, default=16, help="epochs of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/sparsity"), help="folder of the results")
    given = parser.parse_args(arguments)
    sparsity_report(train(given.pattern, given.recipe, given.epochs, given.output))
    print(f"Written to {given.output}/: nm_sparsity.png, nm_sparsity.csv, metrics.csv and checkpoints/.")


if __name__ == "__main__":
    main()
