"""See what a small network looks at while it trains. Takes seconds.

::

    python examples/probes.py
    python examples/probes.py --epochs 5

Only the callbacks in :func:`train` use lightning-grad; ``plain_project`` does not know it.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, ResidualConvNet

from lightning_grad.callbacks import GradCAMLogger, GradientDiversity, HessianSpectrum, InputGradientLogger


def train(epochs: int, output: Path) -> dict[str, float]:
    """Train a small convnet with probes, and return the last logged values."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[
            GradCAMLogger(layer="net.4", samples=8),
            InputGradientLogger(samples=8),
            HessianSpectrum(samples=40),
            GradientDiversity(samples=100),
        ],
        logger=CSVLogger(output, name=None, version=""),
        log_every_n_steps=10,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(ResidualConvNet(width=8, optimizer="sgd", lr=0.05), Digits())
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with the options of the command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/probes"), help="folder of the results")
    given = parser.parse_args(arguments)
    logged = train(given.epochs, given.output)
    print(f"Grad-CAM: {logged['explain/gradcam/accuracy']:.0%} of 8 images are answered right.")
    print(f"Curvature: largest eigenvalue {logged['curvature/eigenvalue_1']:.3g}.")
    print(f"Gradients of 100 samples: {logged['diversity/g_vendi']:.3g} different directions.")
    print(f"Written to {given.output}/: one figure for each probe, one folder with what each look found.")


if __name__ == "__main__":
    main()
