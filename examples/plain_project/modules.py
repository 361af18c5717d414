"""The LightningModules that classify images."""

from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torchmetrics.classification import MulticlassAccuracy

from plain_project.networks import PatchTransformer, ResidualNetwork
from plain_project.schedules import Schedule, with_schedule


class ImageClassifier(LightningModule):
    """Train any network that maps images to logits.

    Args:
        net: Network from images ``(batch, channels, height, width)`` to logits ``(batch, classes)``.
        classes: Number of classes.
        label_smoothing: Share of the target probability that is spread over all classes.
        optimizer: ``"adamw"`` or ``"sgd"``.
        lr: Peak learning rate.
        weight_decay: Weight decay of the optimizer.
        momentum: Momentum of ``"sgd"``; ``"adamw"`` does not use it.
        schedule: ``"cosine"`` for linear warm-up and cosine decay to zero, ``"warmup"`` for the warm-up and a fixed
            rate, ``"linear"`` for a linear decay to zero, ``"piecewise"`` for a tenth of the rate after half of the run
            and again after three quarters, ``"one-cycle"`` for torch's ``OneCycleLR``, ``"constant"`` for a fixed rate.
        warmup: Fraction of the training steps for the warm-up of ``"cosine"`` and ``"warmup"``.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int = 10,
        label_smoothing: float = 0.0,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.9,
        schedule: Schedule = "cosine",
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.val_acc = MulticlassAccuracy(classes, average="micro")
        self.test_acc = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss on ``batch``."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy on ``batch``."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", self.loss(logits, labels), sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log accuracy on ``batch``."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule."""
        steps = self.trainer.estimated_stepping_batches
        return with_schedule(self._optimizer(), self.schedule, steps, self.warmup)

    def _optimizer(self) -> Optimizer:
        if self.optimizer == "adamw":
            return AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self.optimizer == "sgd":
            return SGD(self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        raise ValueError(f"optimizer must be 'adamw' or 'sgd'; got {self.optimizer!r}.")


class VisionTransformer(ImageClassifier):
    """Classify images with a small vision transformer.

    Args:
        image_size: Height and width of the square input images.
        patch_size: Height and width of the square patches; divides ``image_size``.
        channels: Channels of the input images.
        width: Width of the token embeddings.
        depth: Number of transformer layers.
        heads: Number of attention heads.
        mlp_ratio: Width of the hidden layer of each MLP as a multiple of ``width``.
        classes: Number of classes.
        dropout: Dropout probability inside the transformer layers.
        kwargs: Loss, optimizer and schedule, see :class:`ImageClassifier`.
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        channels: int = 1,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        mlp_ratio: int = 2,
        classes: int = 10,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        net = PatchTransformer(image_size, patch_size, channels, width, depth, heads, mlp_ratio, classes, dropout)
        super().__init__(net, classes=classes, **kwargs)


class ResidualConvNet(ImageClassifier):
    """Classify images of any size with a small residual convolutional network.

    Args:
        channels: Channels of the input images.
        width: Channels of the first stage; each later stage doubles them and halves the resolution.
        blocks_per_stage: Number of residual blocks of each stage.
        classes: Number of classes.
        kwargs: Loss, optimizer and schedule, see :class:`ImageClassifier`.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 32,
        blocks_per_stage: tuple[int, ...] = (1, 1, 1),
        classes: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(ResidualNetwork(channels, width, blocks_per_stage, classes), classes=classes, **kwargs)
