"""Clip gradient spikes at ten times the usual learning rate. Takes seconds.

::

    python examples/clipping.py
    python examples/clipping.py --threshold 2 --steps 600

Only the callbacks in :func:`train` use lightning-grad; ``plain_project`` does not know it. ``studies/claims/`` compares
rules.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import CharTransformer, Text

from lightning_grad.callbacks import GradientMonitor, SkipNonFinite, ZClip


def train(threshold: float, steps: int, output: Path) -> dict[str, float]:
    """Train a small transformer on characters, and return the last logged values."""
    seed_everything(0, verbose=False)
    data = Text(context=24, batch_size=16)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[SkipNonFinite(), ZClip(z_threshold=threshold), GradientMonitor()],
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = CharTransformer(data.vocabulary_size, context=24, depth=1, lr=0.05, schedule="warmup", warmup=0.1)
    trainer.fit(module, data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threshold", type=float, default=2.5, help="standard deviations above the mean norm")
    parser.add_argument("--steps", type=int, default=300, help="steps of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/clipping"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.threshold, given.steps, given.output)
    clipped, skipped = logged["grad/zclip/clipped_share"], logged["grad/skipped_steps"]
    print(f"The loss ended at {logged['train_loss']:.3g}. ZClip clipped {100 * clipped:.1f} % of the steps.")
    print(f"SkipNonFinite skipped {skipped:.0f}.")
    print(f"Written to {given.output}/: gradient_monitor.png, gradient_monitor.csv, metrics.csv and checkpoints/.")


if __name__ == "__main__":
    main()
