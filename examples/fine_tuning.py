"""Train a small vision transformer, then adapt it to images that are turned, by adapters in a small file. Takes seconds.

::

    python examples/fine_tuning.py
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_project import Digits, VisionTransformer
from torch.utils.data import TensorDataset

from lightning_grad.callbacks import LoRA
from lightning_grad.utilities import load_adapters, save_adapters


class TurnedDigits(Digits):
    """Digits that lie on their side."""

    def setup(self, stage: str) -> None:
        """Turn all images."""
        super().setup(stage)
        for name in ("train_set", "val_set"):
            images, labels = getattr(self, name).tensors
            setattr(self, name, TensorDataset(images.rot90(1, (2, 3)), labels))


def train(module: VisionTransformer, data: Digits, callbacks: list[Callback], epochs: int, folder: Path) -> None:
    """Train a module and print its accuracy."""
    callbacks += [ModelCheckpoint(folder, "last", enable_version_counter=False)]
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False)
    trainer.fit(module, data)
    print(f"{folder.name}: {float(trainer.callback_metrics['val_acc']):.1%} right")


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, adapt, write the adapters, and load them into the pretrained module."""
    seed_everything(0, verbose=False)
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each training")
    parser.add_argument("--output", type=Path, default=Path("runs/fine_tuning"), help="folder of the results")
    given = parser.parse_args(arguments)
    module, turned = VisionTransformer(), TurnedDigits()
    train(module, Digits(), [], given.epochs, given.output / "pretrained")
    train(module, turned, [LoRA(rank=4, alpha=8, init="ga")], given.epochs, given.output / "lora")
    save_adapters(given.output / "lora" / "last.ckpt", given.output / "adapters.pt")
    loaded = VisionTransformer()
    loaded.load_state_dict(torch.load(given.output / "pretrained" / "last.ckpt", weights_only=True)["state_dict"])
    load_adapters(loaded, given.output / "adapters.pt")
    found, expected = (each.eval()(next(iter(turned.val_dataloader()))[0]).argmax(1) for each in (loaded, module))
    print(f"adapters.pt: {'the same' if torch.equal(found, expected) else 'other'} predictions after loading")


if __name__ == "__main__":
    main()
