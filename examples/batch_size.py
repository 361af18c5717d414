"""Train a small network with large batches: as it is, with rates and statistics for them, and growing. Takes seconds.

::

    python examples/batch_size.py
    python examples/batch_size.py --batch-size 256 --size 16

Only the callbacks in :func:`main` use lightning-grad.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ImageClassifier
from torch import nn

from lightning_grad.callbacks import AdaptiveBatchSize, BatchSizeLRScaling, GhostBatchNorm


def train(name: str, callbacks: list[Callback], batch_size: int, epochs: int, output: Path) -> None:
    """Train a small network with BatchNorm and print its accuracy."""
    seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    logger = CSVLogger(output, name=name, version="")
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", log_every_n_steps=2, callbacks=callbacks, logger=logger)
    trainer.fit(ImageClassifier(net), Digits(batch_size=batch_size))
    print(f"{name}: {float(trainer.callback_metrics['val_acc']):.1%} right")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train three times with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="samples of a batch")
    parser.add_argument("--size", type=int, default=32, help="largest number of samples in a chunk")
    parser.add_argument("--base", type=int, default=64, help="samples for which the learning rate was chosen")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training")
    parser.add_argument("--output", type=Path, default=Path("runs/batch_size"), help="folder of the results")
    given = parser.parse_args(arguments)
    train("plain", [], given.batch_size, given.epochs, given.output)
    scaled: list[Callback] = [GhostBatchNorm(given.size), BatchSizeLRScaling(base_batch_size=given.base)]
    train("scaled", scaled, given.batch_size, given.epochs, given.output)
    grown: list[Callback] = [AdaptiveBatchSize(start=2, every_n_steps=5), BatchSizeLRScaling(base_batch_size=2 * 16)]
    train("grown", grown, 16, given.epochs, given.output)
    print(f"Written to {given.output}/, plain/, scaled/ and grown/: metrics.csv.")


if __name__ == "__main__":
    main()
