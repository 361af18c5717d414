"""Train a small residual network, let it forget a tenth of its samples, and compare it with one trained without them.

::

    python examples/unlearning.py
    python examples/unlearning.py --keep 1.0  # random labels, without a mask of salient weights
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ResidualConvNet
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import SaliencyUnlearning

FORGET = range(0, 500, 10)


def train(module: LightningModule, data: TensorDataset, callbacks: list[Callback], epochs: int, output: Path) -> None:
    """Train a module."""
    logger = CSVLogger(output.parent, name=None, version=output.name)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=logger, log_every_n_steps=5)
    trainer.fit(module, DataLoader(data, 64, shuffle=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, train without some samples, and forget them."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the weights that train")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of the unlearning")
    parser.add_argument("--epochs", type=int, default=16, help="epochs of each training; half of them to forget")
    parser.add_argument("--output", type=Path, default=Path("runs/unlearning"), help="folder of the results")
    given = parser.parse_args(arguments)
    seed_everything(0, verbose=False)
    digits = Digits()
    digits.setup("fit")
    images, labels = digits.train_set[:500]
    forgets = torch.isin(torch.arange(500), torch.tensor(FORGET))
    whole = TensorDataset(images, labels)
    trained, retrained, module = (ResidualConvNet(width=8, lr=lr) for lr in (0.1, 0.1, given.lr))
    train(trained, whole, [], given.epochs, given.output / "trained")
    train(retrained, TensorDataset(images[~forgets], labels[~forgets]), [], given.epochs, given.output / "retrained")
    module.load_state_dict(trained.state_dict())
    train(module, whole, [SaliencyUnlearning(FORGET, given.keep)], given.epochs // 2, given.output / "unlearned")
    parts = {"forgotten": (images[forgets], labels[forgets]), "retained": (images[~forgets], labels[~forgets])}
    for name, (x, y) in {**parts, "new": digits.val_set[:]}.items():
        shares = [f"{(each.eval()(x).argmax(1) == y).float().mean():.1%}" for each in (trained, retrained, module)]
        print(
            f"{name} samples: right on {shares[0]} before, {shares[1]} retrained without them, {shares[2]} after unlearning"
        )
    print(f"Written to {given.output}/: metrics.csv of each training.")


if __name__ == "__main__":
    main()
