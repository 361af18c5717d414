"""Train two processes apart, which exchange weights every twenty steps instead of gradients in each. Takes seconds.

::

    python examples/local_steps.py
    python examples/local_steps.py --every 50 --devices 4

Only ``strategy`` of the Trainer in :func:`train` uses lightning-grad; ``plain_project`` does not know it.
``studies/claims/local_steps.py`` compares strategies over seeds.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import CharTransformer, Text

from lightning_grad.strategies import DiLoCoStrategy


def train(every: int, devices: int, steps: int, output: Path) -> dict[str, float]:
    """Train a small transformer on several processes, and return the last logged values."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy=DiLoCoStrategy(every, start_method="spawn"),
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    data = Text(batch_size=32 // devices)
    trainer.fit(CharTransformer(data.vocabulary_size, data.context, lr=3e-3), data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--every", type=int, default=20, help="optimizer steps between two exchanges")
    parser.add_argument("--devices", type=int, default=2, help="number of processes")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/local_steps"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.every, given.devices, given.steps, given.output)
    print(f"Each process sent {logged['comm/ratio']:.1f} times less than the gradients of all steps.")
    print(f"The validation loss ended at {logged['val_loss']:.3f}.")
    print(f"Written to {given.output}/: di_lo_co_strategy.png, di_lo_co_strategy.csv, metrics.csv.")


if __name__ == "__main__":
    main()
