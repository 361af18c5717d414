"""Train on data with a broken image: skip its steps, or go back to before them. Takes seconds.

::

    python examples/spikes.py
    python examples/spikes.py --window 16

Skipping a step protects the weights, but BatchNorm has already averaged the bad values. Going back restores its statistics
too. Only the callbacks in :func:`main` use lightning-grad.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ResidualConvNet

from lightning_grad.callbacks import SkipNonFinite, SpikeRewind


class BrokenDigits(Digits):
    """Digits of which one training image has a pixel that is not a number."""

    def setup(self, stage: str) -> None:
        """Create the sets, and break image 700."""
        super().setup(stage)
        self.train_set[700][0][0, 0, 0] = float("nan")


def train(name: str, callbacks: list[Callback], epochs: int, output: Path) -> None:
    """Train a small convnet, and print its loss and accuracy in validation."""
    seed_everything(0, verbose=False)
    logger = CSVLogger(output, name=name, version="")
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", log_every_n_steps=10, callbacks=callbacks, logger=logger)
    trainer.fit(ResidualConvNet(width=8, optimizer="sgd", lr=0.05), BrokenDigits())
    loss, right = (float(trainer.callback_metrics[key]) for key in ("val_loss", "val_acc"))
    print(f"{name}: loss {loss:.3g}, {right:.1%} right")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train twice with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--window", type=int, default=8, help="largest number of steps to go back")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each training")
    parser.add_argument("--output", type=Path, default=Path("runs/spikes"), help="folder of the results")
    given = parser.parse_args(arguments)
    rewind = SpikeRewind(window=given.window)
    train("skip", [SkipNonFinite()], given.epochs, given.output)
    train("rewind", [rewind], given.epochs, given.output)
    seen = [set(row["samples"].split()) for row in rewind.rewinds.rows()]
    print(f"{len(seen)} rewinds. In all bad batches: sample {', '.join(set.intersection(*seen))}.")
    print(f"Written to {given.output}/, skip/ and rewind/: metrics.csv, spike_rewind.png and spike_rewind.csv.")


if __name__ == "__main__":
    main()
