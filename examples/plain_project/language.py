"""The LightningModule of a character model."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from plain_project.networks import CausalTransformer
from plain_project.schedules import Schedule, with_schedule


class CharTransformer(LightningModule):
    """Predict the next character with a small causal transformer.

    Args:
        vocabulary_size: Number of distinct character ids, at least that of the data.
        context: Longest sequence that the model accepts.
        width: Width of the character embeddings.
        depth: Number of transformer layers.
        heads: Number of attention heads.
        mlp_ratio: Width of the hidden layer of each MLP as a multiple of ``width``.
        dropout: Dropout probability inside the transformer layers.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: ``"cosine"`` for linear warm-up and cosine decay to zero, ``"warmup"`` for the warm-up and a fixed
            rate, ``"constant"`` for a fixed rate.
        warmup: Fraction of the training steps spent on the warm-up.
    """

    def __init__(
        self,
        vocabulary_size: int = 128,
        context: int = 64,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        lr: float = 5e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = "cosine",
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.context = context
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.net = CausalTransformer(vocabulary_size, context, width, depth, heads, mlp_ratio, dropout)
        self.val_perplexity = Perplexity()
        self.val_acc = MulticlassAccuracy(vocabulary_size, average="micro")

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits ``(batch, length, vocabulary)`` of the character after each of ``ids``."""
        logits: Tensor = self.net(ids)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        ids, targets = batch
        loss = F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss, perplexity and next-character accuracy on ``batch``."""
        ids, targets = batch
        logits = self(ids)
        self.val_perplexity(logits, targets)
        self.val_acc(logits.flatten(0, 1), targets.flatten())
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), targets.flatten()), sync_dist=True)
        self.log("val_perplexity", self.val_perplexity)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW and its schedule."""
        optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return with_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches, self.warmup)

    @torch.no_grad()
    def generate(self, prompt_ids: Tensor, n: int, temperature: float = 1.0) -> Tensor:
        """Return ``prompt_ids`` followed by ``n`` sampled ids.

        Args:
            prompt_ids: Ids to continue, of shape ``(length,)`` with ``length`` at least one.
            n: Number of ids to sample.
            temperature: Divisor of the logits; less than one for likelier, more than one for more varied samples.
        """
        ids = prompt_ids.to(self.device)
        for _ in range(n):
            logits = self(ids[None, -self.context :])[0, -1]
            sample = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
            ids = torch.cat([ids, sample])
        return ids
