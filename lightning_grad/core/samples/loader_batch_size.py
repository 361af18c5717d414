"""The number of samples in a full batch of the training loader."""

from typing import Any

import lightning.pytorch as pl


def loader_batch_size(trainer: pl.Trainer) -> int | None:
    """Return how many samples a full batch of this rank has; ``None`` if the training loader does not say.

    Call it in ``on_train_start`` or later. A loader says it with ``batch_size``, or its batch sampler does. Several
    loaders, other loaders and batch samplers of other classes may say nothing.
    """
    loader: Any = trainer.train_dataloader
    # A sampler that yields lists of indices takes the place of a batch sampler in DataLoader(batch_size=None).
    sources = (getattr(loader, name, None) for name in ("batch_sampler", "sampler"))
    sizes = (getattr(each, "batch_size", None) for each in (loader, *sources))
    return next((size for size in sizes if isinstance(size, int) and not isinstance(size, bool)), None)
