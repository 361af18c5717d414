"""Train a small vision transformer with weights of 4 bits. Takes seconds.

::

    python examples/quantization.py
    python examples/quantization.py --bits 2 --sparse
    python examples/quantization.py --bits 3 --after

Only the callbacks in :func:`train` use lightning-grad; ``plain_project`` does not know them.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from plain_project import Digits, VisionTransformer

from lightning_grad.callbacks import LearnedRounding, NMSparsity, QuantizationAwareTraining
from lightning_grad.utilities import quantization_report


def train(callbacks: list[Callback], epochs: int, output: Path) -> VisionTransformer:
    """Train a small vision transformer, and return it."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=callbacks,
        logger=CSVLogger(output, name=None, version=""),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    module = VisionTransformer()
    trainer.fit(module, Digits())
    print(f"Validation accuracy: {100 * float(trainer.callback_metrics['val_acc']):.1f} %")
    return module


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once, and print the bits and levels of each weight."""
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, help="bits of a weight, 2 to 8")
    parser.add_argument("--sparse", action="store_true", help="also prune the weights to 2:4")
    parser.add_argument("--after", action="store_true", help="round when the training ends, not in each step")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the training")
    parser.add_argument("--output", type=Path, default=Path("runs/quantization"), help="folder of the results")
    given = parser.parse_args(arguments)
    after = LearnedRounding(given.bits, samples=512, steps=100)
    quantization = after if given.after else QuantizationAwareTraining(given.bits)
    sparsity = [NMSparsity("2:4", "sr-ste", figure=False)] if given.sparse else []
    module = train([*sparsity, quantization], given.epochs, given.output)
    quantization_report(module, include=["*.layers.*"])
    print(f"Written to {given.output}/: metrics.csv and checkpoints/.")


if __name__ == "__main__":
    main()
