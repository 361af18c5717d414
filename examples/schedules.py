"""Cut the learning rate when the accuracy stops rising. Takes seconds.

::

    python examples/schedules.py
    python examples/schedules.py --epochs 40 --threshold 0.002

Only the callback in :func:`train` uses lightning-grad; ``plain_project`` does not know it.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ResidualConvNet

from lightning_grad.callbacks import AccuracyGradientLR


def train(epochs: int, threshold: float, output: Path) -> dict[str, float]:
    """Train a small network with AccuracyGradientLR, and return the last logged values."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=5,
        callbacks=[AccuracyGradientLR("val_acc", window=2, cooldown=2, threshold=threshold, factor=0.5)],
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(ResidualConvNet(width=4, lr=0.02, schedule="constant"), Digits())
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="epochs of the training")
    parser.add_argument(
        "--threshold", type=float, default=0.01, help="least rise of the mean accuracy that avoids a cut"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/schedules"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.epochs, given.threshold, given.output)
    print(f"{logged['lr/cuts']:.0f} cuts: the learning rate ended at {logged['lr/scale']:.3g} times its first value.")
    print(f"The validation accuracy ended at {logged['val_acc']:.1%}.")
    print(f"Written to {given.output}/: accuracy_gradient_lr.csv, accuracy_gradient_lr.png, metrics.csv.")


if __name__ == "__main__":
    main()
