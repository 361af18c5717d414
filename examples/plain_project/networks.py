"""The networks of the project, plain ``nn.Module``s without a training loop."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def transformer_encoder(width: int, depth: int, heads: int, mlp_ratio: int, dropout: float) -> nn.TransformerEncoder:
    """Build a pre-norm GELU transformer encoder, without the LayerNorm after its last layer."""
    layer = nn.TransformerEncoderLayer(
        width, heads, mlp_ratio * width, dropout, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class PatchTransformer(nn.Module):
    """Vision transformer with linear patch embedding, learned positions and mean pooling.

    Args:
        image_size: Height and width of the square input images.
        patch_size: Height and width of the square patches; divides ``image_size``.
        channels: Channels of the input images.
        width: Width of the token embeddings.
        depth: Number of transformer layers.
        heads: Number of attention heads.
        mlp_ratio: Width of the hidden layer of each MLP as a multiple of ``width``.
        classes: Number of output logits.
        dropout: Dropout probability inside the transformer layers.

    Raises:
        ValueError: If ``patch_size`` does not divide ``image_size``.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}.")
        self.patches = nn.Unfold(patch_size, stride=patch_size)
        self.embedding = nn.Linear(channels * patch_size**2, width)
        self.position = nn.Parameter(0.5 * torch.randn(1, (image_size // patch_size) ** 2, width))
        self.encoder = transformer_encoder(width, depth, heads, mlp_ratio, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(batch, classes)`` of ``images`` ``(batch, channels, height, width)``."""
        tokens = self.embedding(self.patches(images).transpose(1, 2)) + self.position
        logits: Tensor = self.head(self.norm(self.encoder(tokens).mean(dim=1)))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations after the block."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResidualNetwork(nn.Sequential):
    """Residual network whose stages double the width and, from the second on, halve the resolution.

    Args:
        channels: Channels of the input images.
        width: Channels of the first stage.
        blocks_per_stage: Number of residual blocks of each stage.
        classes: Number of output logits.
    """

    def __init__(self, channels: int, width: int, blocks_per_stage: Sequence[int], classes: int) -> None:
        stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        blocks: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks_per_stage):
            outputs = width * 2**stage
            for block in range(count):
                blocks.append(ResidualBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class CausalTransformer(nn.Module):
    """Causal transformer over token ids.

    Args:
        vocabulary_size: Number of distinct token ids.
        context: Longest sequence that the network accepts.
        width: Width of the token embeddings.
        depth: Number of transformer layers.
        heads: Number of attention heads.
        mlp_ratio: Width of the hidden layer of each MLP as a multiple of ``width``.
        dropout: Dropout probability inside the transformer layers.
    """

    mask: Tensor

    def __init__(
        self,
        vocabulary_size: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.position = nn.Parameter(0.1 * torch.randn(1, context, width))
        self.encoder = transformer_encoder(width, depth, heads, mlp_ratio, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits ``(batch, length, vocabulary)`` of the id that follows each of ``ids``."""
        length = ids.shape[1]
        tokens = self.embedding(ids) + self.position[:, :length]
        encoded = self.encoder(tokens, mask=self.mask[:length, :length], is_causal=True)
        logits: Tensor = self.head(self.norm(encoded))
        return logits
