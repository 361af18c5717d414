"""Find out when and where a run goes bad, and what each callback costs. Takes seconds.

::

    python examples/diagnostics.py
    python examples/diagnostics.py --lr 0.003

The default learning rate is far too high. Only the callbacks in :func:`train` use lightning-grad; ``plain_project`` does not
know it.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, VisionTransformer

from lightning_grad.callbacks import GradientMonitor, TrainingDoctor


def train(lr: float, epochs: int, output: Path) -> dict[str, float]:
    """Train a small transformer, watch its gradients, and return the last logged values."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=1,  # so the figure has layers from before the run goes bad
        callbacks=[TrainingDoctor(batches=15), GradientMonitor(layer_depth=3)],
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(VisionTransformer(lr=lr, optimizer="sgd", schedule="constant"), Digits())
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lr", type=float, default=5.0, help="learning rate of SGD")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/diagnostics"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.lr, given.epochs, given.output)
    facts = given.output / "gradient_monitor_first_bad_step.json"
    if facts.exists():
        bad = json.loads(facts.read_text())
        print(f"Step {bad['step']}, batch {bad['batch_idx']}: first non-finite gradient, in {bad['parameter']}.")
    else:
        print(f"All gradients were finite. The norm ended at {logged['grad/norm']:.3g}.")
    print(f"Written to {given.output}/: gradient_monitor.png, training_doctor.png and .csv files.")


if __name__ == "__main__":
    main()
