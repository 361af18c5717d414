"""Train a small network with and without SAM, and measure how flat the minima are. Takes seconds.

::

    python examples/sharpness.py
    python examples/sharpness.py --rho 0.5 --adaptive

Only the callback in :func:`main` and :func:`rise` use lightning-grad. The run with SAM takes about twice as long.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, VisionTransformer

from lightning_grad.callbacks import SAM
from lightning_grad.functional import ascend_


def rise(module: VisionTransformer, data: Digits, rho: float = 0.2) -> float:
    """Return how much the training loss rises if weights move up its gradient by a length of rho."""
    images, labels = data.train_set[:]
    weights = list(module.eval().parameters())
    loss = module.loss(module(images), labels)
    ascend_(weights, torch.autograd.grad(loss, weights), rho)
    risen: float = (module.loss(module(images), labels) - loss).item()
    return risen


def train(name: str, callbacks: list[Callback], epochs: int, output: Path) -> None:
    """Train a small transformer; print its accuracy, and how much the loss rises near its weights."""
    seed_everything(0, verbose=False)
    logger = CSVLogger(output, name=name, version="")
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", log_every_n_steps=10, callbacks=callbacks, logger=logger)
    module, data = VisionTransformer(width=32, depth=2), Digits()
    trainer.fit(module, data)
    right = float(trainer.callback_metrics["val_acc"])
    print(f"{name}: {right:.1%} right, the loss rises by {rise(module, data):.2g}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train twice with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.05, help="length of the move")
    parser.add_argument("--adaptive", action="store_true", help="measure it relative to the weights (ASAM)")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of each training")
    parser.add_argument("--output", type=Path, default=Path("runs/sharpness"), help="folder of the results")
    given = parser.parse_args(arguments)
    train("plain", [], given.epochs, given.output)
    train("sam", [SAM(given.rho, given.adaptive)], given.epochs, given.output)
    print(f"Written to {given.output}/, plain/ and sam/: metrics.csv, with sam/sharpness.")


if __name__ == "__main__":
    main()
