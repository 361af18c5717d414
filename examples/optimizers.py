"""Train a small transformer with AdamW, layer-wise rates, Lookahead, Lion, FRUGAL and TrAct. Its code stays as it is.

::

    python examples/optimizers.py
    python examples/optimizers.py --optimizer adabelief --lr-factor 1 --wd-factor 1

Only the callbacks and the report in :func:`train` use lightning-grad; ``plain_project`` does not know them.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, VisionTransformer

from lightning_grad.callbacks import LayerwiseLearningRateDecay, Lookahead, OptimizerSwap, TrAct
from lightning_grad.utilities import optimizer_report


def train(callbacks: list[Callback], epochs: int, output: Path) -> None:
    """Train a small transformer; print what moved its weights, and the accuracy."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=5,
        callbacks=callbacks,
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(VisionTransformer(optimizer="adamw"), Digits())
    print(optimizer_report(trainer))
    print(f"The validation accuracy ended at {float(trainer.callback_metrics['val_acc']):.1%}.\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train six times with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--optimizer", default="lion", help="short name or dotted path of the other optimizer")
    parser.add_argument("--lr-factor", type=float, default=0.2, help="factor of the learning rate")
    parser.add_argument("--wd-factor", type=float, default=5.0, help="factor of the weight decay")
    parser.add_argument("--damping", type=float, default=0.1, help="damping of TrAct, with AdamW")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each training")
    parser.add_argument("--output", type=Path, default=Path("runs/optimizers"), help="folder of the results")
    given = parser.parse_args(arguments)
    swap = OptimizerSwap(given.optimizer, lr_factor=given.lr_factor, wd_factor=given.wd_factor)
    tried = {"layers": LayerwiseLearningRateDecay(0.75), "lookahead": Lookahead(k=5, alpha=0.5), "swapped": swap}
    tried |= {"frugal": OptimizerSwap("frugal"), "tract": TrAct(given.damping)}  # FRUGAL moves hidden matrices only
    train([], given.epochs, given.output / "adamw")
    for name, callback in tried.items():
        train([callback], given.epochs, given.output / name)
    print(f"Written to {given.output}/: metrics.csv of each training.")


if __name__ == "__main__":
    main()
