"""Train on two processes that send one entry in a hundred of their gradients. Takes seconds.

::

    python examples/communication.py
    python examples/communication.py --ratio 0.001 --devices 4

Only ``strategy`` of the Trainer in :func:`train` uses lightning-grad; ``plain_project`` does not know it.
``studies/claims/communication.py`` compares strategies over seeds.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ImageClassifier
from torch import nn

from lightning_grad.strategies import DGCStrategy


def train(ratio: float, devices: int, epochs: int, output: Path) -> dict[str, float]:
    """Train a small network on several processes, and return the last logged values."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=DGCStrategy(ratio, start_method="spawn"),
        log_every_n_steps=10,
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    layers = (nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    module = ImageClassifier(nn.Sequential(nn.Flatten(), *layers), optimizer="sgd", lr=0.05)
    trainer.fit(module, Digits(batch_size=64 // devices))
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.01, help="share of gradient entries to send")
    parser.add_argument("--devices", type=int, default=2, help="number of processes")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of the training; the first four send more")
    parser.add_argument("--output", type=Path, default=Path("runs/communication"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.ratio, given.devices, given.epochs, given.output)
    sent, ratio = logged["comm/bytes_sent"] / 1e3, logged["comm/ratio"]
    print(f"At the end each process sent {sent:.1f} kB a step; the full gradients are {ratio * sent:.1f} kB.")
    print(f"The validation accuracy ended at {logged['val_acc']:.1%}.")
    print(f"Written to {given.output}/: dgc_strategy.png, dgc_strategy.csv, dgc_strategy_layers.csv, metrics.csv.")


if __name__ == "__main__":
    main()
