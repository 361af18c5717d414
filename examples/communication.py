"""Train on two processes that send one entry in a hundred of their gradients, in seconds.

::

    python examples/communication.py
    python examples/communication.py --ratio 0.001 --devices 4

One argument of the Trainer in :func:`train` does it. The project that is trained, ``plain_project``, knows nothing of
lightning-grad. ``studies/communication.py`` compares strategies.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ResidualConvNet

from lightning_grad.strategies import DGCStrategy


def train(ratio: float, devices: int, epochs: int, output: Path) -> dict[str, float]:
    """Train a small residual network on several processes, and return what was logged last."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=DGCStrategy(ratio, warmup="paper", start_method="spawn"),
        log_every_n_steps=10,
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(ResidualConvNet(width=16, optimizer="sgd", lr=0.05, weight_decay=5e-4), Digits(batch_size=32))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once, as the command line says."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.01, help="share of the entries of a gradient that is sent")
    parser.add_argument("--devices", type=int, default=2, help="number of processes")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/communication"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.ratio, given.devices, given.epochs, given.output)
    print(f"Validation accuracy: {100 * logged['val_acc']:.1f} %, {logged['comm/ratio']:.0f} x fewer bytes than DDP")
    print(f"Written to {given.output}/: dgc_strategy.png, metrics.csv and checkpoints/.")


if __name__ == "__main__":
    main()
