"""Per-sample gradient norms against one backward pass for each sample, and what is left behind."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_grad.functional.gradients._ghost.layouts import Layout, belongs_to, candidates
from lightning_grad.functional.gradients._ghost.sums import connected
from lightning_grad.functional.gradients._ghost.tracer import Source
from lightning_grad.functional.gradients.gradient_rows import PerSampleGradients
from lightning_grad.functional.gradients.per_sample_gradients import PerSampleGradientNorms, per_sample_gradient_norms
from tests.cases import cases

Draw = Callable[[int], tuple[Tensor, ...]]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def reference(module: nn.Module, losses: Tensor) -> Tensor:
    """One backward pass for each sample."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None)))
    return torch.tensor(norms, dtype=losses.dtype)


def assert_exact(
    module: nn.Module,
    draw: Draw,
    sizes: tuple[int, ...] = (4, 3, 1),
    dtype: torch.dtype = torch.float64,
    per_sample: Callable[[Tensor], Tensor] = lambda out: out.flatten(1),
) -> dict[str, str]:
    """Compare batches of several sizes, the last ones partial, and return the coverage."""
    module = module.to(dtype).eval()
    norms, rows = PerSampleGradientNorms(module), PerSampleGradients(module)
    for samples in sizes:
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in draw(samples))

        def compute_losses(inputs: tuple[Tensor, ...] = inputs) -> Tensor:
            out = per_sample(module(*inputs))
            weights = torch.linspace(0.5, 1.5, out.shape[1], dtype=dtype)
            return (out.sin() * weights).mean(1) + 0.1 * out.square().sum(1)

        expected = reference(module, compute_losses())
        found = norms(compute_losses)
        if dtype == torch.float64:
            assert_rows(module, rows, compute_losses)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=1e-12)
        assert expected.min() > 0
        if samples > 1:
            assert expected.max() / expected.min() > 1.0001  # norms that were all the same would show little
    return dict(norms.coverage)


def assert_rows(module: nn.Module, gradients: PerSampleGradients, compute_losses: Callable[[], Tensor]) -> None:
    """Compare all blocks of the stream with one backward pass for each sample."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    losses = compute_losses()
    found = {name: p.new_zeros(len(losses), p.numel()) for name, p in parameters.items()}

    def receive(name: str, start: int, block: Tensor) -> None:
        assert block.shape[1] == parameters[name].numel()
        found[name][start : start + len(block)] += block

    gradients.stream(compute_losses, receive)
    for row, loss in enumerate(losses):
        each = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), each, strict=True):
            expected = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            torch.testing.assert_close(found[name][row], expected.flatten(), rtol=1e-9, atol=1e-12, msg=name)


def images(*shape: int) -> Draw:
    return lambda samples: (torch.randn(samples, *shape),)


def tokens(*shape: int, high: int = 11) -> Draw:
    return lambda samples: (torch.randint(high, (samples, *shape)),)


def is_ghost(coverage: dict[str, str]) -> bool:
    return all(how.startswith("ghost") for how in coverage.values())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Modules that rules cover


class Residual(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x), inplace=True)


def trained_statistics(module: nn.Module) -> nn.Module:
    """Give BatchNorm and InstanceNorm layers statistics other than zero and one, and all scales other values than one."""
    for child in module.modules():
        if getattr(child, "running_mean", None) is not None:
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.running_var, 0.5, 2.0)
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.8)
    return module


def convnet() -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return trained_statistics(nn.Sequential(first, Residual(8), Residual(8, 2), head))


COVERED: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), images(6)),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), images(6)),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)), images(7, 6)),
    "long sequence": (lambda: nn.Linear(3, 2), images(20, 3)),
    "two dims of rows": (lambda: nn.Linear(6, 5), images(3, 2, 6)),
    "convnet": (convnet, images(3, 12, 12)),
    "conv few pixels": (lambda: nn.Conv2d(6, 7, 3), images(6, 4, 4)),
    "conv many pixels": (lambda: nn.Conv2d(2, 3, 3, padding=1), images(2, 12, 11)),
    "conv strided": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 2)), images(3, 11, 10)),
    "conv dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 3), padding=2, stride=(1, 2)), images(3, 11, 12)),
    "conv grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), images(4, 9, 8)),
    "conv depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), images(4, 9, 8)),
    "conv grouped few pixels": (lambda: nn.Conv2d(16, 16, 3, groups=2, padding=1), images(16, 2, 2)),
    "conv 1x1": (lambda: nn.Conv2d(4, 5, 1, stride=2), images(4, 9, 8)),
    "conv 1x1 grouped": (lambda: nn.Conv2d(4, 6, 1, groups=2), images(4, 3, 3)),
    "conv 1x1 padded": (lambda: nn.Conv2d(4, 5, 1, padding=1), images(4, 3, 3)),
    "conv same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), images(2, 9, 8)),
    "conv valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), images(2, 9, 8)),
    "conv circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), images(2, 7, 8)),
    "conv uneven": (lambda: nn.Conv2d(2, 3, 3, stride=4), images(2, 10, 10)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, stride=2, padding=2), images(3, 15)),
    "conv1d few": (lambda: nn.Conv1d(6, 8, 3, padding=1, dilation=2), images(6, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 3), padding=1, stride=(1, 2, 1)), images(2, 5, 6, 4)),
    "conv3d few": (lambda: nn.Conv3d(4, 6, 2), images(4, 2, 3, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1, dilation=2), images(3, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), images(3, 5, 6)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=(1, 2)), images(4, 5, 6)),
    "transposed few": (lambda: nn.ConvTranspose2d(8, 8, 3), images(8, 2, 2)),
    "transposed odd": (lambda: nn.ConvTranspose2d(3, 4, 3, dilation=3, output_padding=2), images(3, 5, 6)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), images(2, 3, 2, 3)),
    "batch norm": (lambda: trained_statistics(nn.BatchNorm1d(5)), images(5)),
    "batch norm 1d": (lambda: trained_statistics(nn.BatchNorm1d(5)), images(5, 3)),
    "batch norm 3d": (lambda: trained_statistics(nn.BatchNorm3d(2)), images(2, 3, 2, 2)),
    "group norm": (lambda: trained_statistics(nn.GroupNorm(2, 6)), images(6, 3, 4)),
    "group norm flat": (lambda: trained_statistics(nn.GroupNorm(2, 6)), images(6)),
    "instance norm": (lambda: trained_statistics(nn.InstanceNorm2d(3, affine=True)), images(3, 4, 5)),
    "instance norm tracked": (
        lambda: trained_statistics(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        images(3, 5),
    ),
    "layer norm": (lambda: trained_statistics(nn.LayerNorm(6)), images(4, 6)),
    "layer norm 2 dims": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((5, 3))), images(2, 5, 3)),
    "layer norm no bias": (lambda: trained_statistics(nn.LayerNorm(6, bias=False)), images(6)),
    "rms norm": (lambda: trained_statistics(nn.RMSNorm(6)), images(4, 6)),
    "prelu": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3), nn.Conv2d(3, 2, 2), nn.PReLU()), images(2, 4, 5)),
    "embedding": (lambda: nn.Embedding(11, 4), tokens(9)),
    "embedding padding": (lambda: nn.Embedding(5, 4, padding_idx=-3), tokens(9, high=5)),
    "embedding 2 dims": (lambda: nn.Embedding(5, 4), tokens(3, 2, high=5)),
    "bag sum": (lambda: nn.EmbeddingBag(7, 4, mode="sum"), tokens(6, high=7)),
    "bag mean": (lambda: nn.EmbeddingBag(5, 4, mode="mean", padding_idx=1), tokens(6, high=5)),
    "bag weights": (
        lambda: Bag(nn.EmbeddingBag(5, 4, mode="sum", padding_idx=0)),
        lambda samples: (torch.randint(5, (samples, 6)), torch.randn(samples, 6)),
    ),
}


class Bag(nn.Module):
    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, index: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.bag(index, per_sample_weights=weights)
        return out


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@cases("name", COVERED)
def test_rules_give_what_backward_gives(name: str) -> None:
    build, draw = COVERED[name]
    coverage = assert_exact(build(), draw)
    assert coverage
    assert is_ghost(coverage), coverage


@pytest.mark.parametrize(
    "name", ["mlp", "sequence", "convnet", "conv grouped", "transposed2d", "layer norm", "embedding"]
)
def test_rules_are_exact_enough_in_float32(name: str) -> None:
    build, draw = COVERED[name]
    assert_exact(build(), draw, (6, 2), torch.float32)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_given_by_offsets(mode: str) -> None:
    bag = nn.EmbeddingBag(5, 4, mode=mode).double()
    index, offsets = torch.tensor([1, 1, 3, 4, 0, 1, 2, 2]), torch.tensor([0, 3, 3, 7])

    def compute_losses() -> Tensor:
        return bag(index, offsets).square().sum(1)

    torch.testing.assert_close(PerSampleGradientNorms(bag)(compute_losses), reference(bag, compute_losses()))
    assert reference(bag, compute_losses())[1] == 0  # an empty bag


def test_numbers_worked_by_hand() -> None:
    # loss = w . x + b, so the gradient is (x, 1); the second sample's loss is three times that.
    module = nn.Linear(2, 1)
    inputs = torch.tensor([[3.0, 4.0], [2.0, 2.0]])
    found = per_sample_gradient_norms(module, lambda: module(inputs).squeeze(1) * torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([math.sqrt(26), 9.0]))


# Attention


def attention(**settings: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(8, 2, **settings)
    for name in ("in_proj_bias", "out_proj.bias"):
        if settings.get("bias", True):
            nn.init.normal_(module.get_parameter(name))
    return module


class Attend(nn.Module):
    """Self-attention, or attention to a memory of another length, with samples first."""

    def __init__(self, cross: bool, mask: bool = False, weights: bool = False, **settings: Any) -> None:
        super().__init__()
        self.attention, self.cross, self.mask, self.weights = attention(**settings), cross, mask, weights

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = memory if self.cross else x
        ignored = torch.zeros(memory.shape[:2], dtype=torch.bool)
        ignored[:, -1] = True
        if not self.attention.batch_first:
            x, memory = (x.transpose(0, 1), memory.transpose(0, 1)) if self.cross else (x.transpose(0, 1),) * 2
        mask = {"key_padding_mask": ignored} if self.mask else {}
        out: Tensor = self.attention(x, memory, memory, need_weights=self.weights, **mask)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [True, False], ids=["cross", "self"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"mask": True, "weights": True}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=["plain", "mask", "no bias", "more keys"],
)
def test_attention(cross: bool, batch_first: bool, settings: dict[str, Any]) -> None:
    module = Attend(cross, batch_first=batch_first, **settings)
    coverage = assert_exact(module, lambda n: (torch.randn(n, 5, 8), torch.randn(n, 6, 8)), (4, 5, 1))
    assert is_ghost(coverage), coverage


def test_attention_with_keys_of_another_width() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention(kdim=3, vdim=4, batch_first=True)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = self.attention(x, key, value)[0]
            return out

    draw: Draw = lambda n: (torch.randn(n, 5, 8), torch.randn(n, 6, 3), torch.randn(n, 6, 4))  # noqa: E731
    assert is_ghost(assert_exact(Wide(), draw))


@pytest.mark.parametrize("length", [4, 6, 8, 2])  # 4: as many tokens as samples; 8 and 2: multiples
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers_find_their_samples(batch_first: bool, length: int) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=length == 6)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    shape: Callable[[int], tuple[int, ...]] = lambda n: (n, length, 8) if batch_first else (length, n, 8)  # noqa: E731
    samples_first: Callable[[Tensor], Tensor] = lambda out: (out if batch_first else out.transpose(0, 1)).flatten(1)  # noqa: E731
    coverage = assert_exact(encoder, lambda n: (torch.randn(shape(n)),), (4, 2, 1, 3), per_sample=samples_first)
    assert is_ghost(coverage), coverage


def test_encoder_with_padding() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

        def forward(self, x: Tensor) -> Tensor:
            ignored = torch.zeros(x.shape[:2], dtype=torch.bool)
            ignored[:, 3:] = True
            out: Tensor = self.encoder(x, src_key_padding_mask=ignored)
            return out[:, :3]

    assert is_ghost(assert_exact(Padded(), images(5, 8)))


def test_decoder_layer() -> None:
    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x.dtype)
            out: Tensor = self.layer(x, memory, tgt_mask=mask)
            return out

    assert is_ghost(assert_exact(Decode(), lambda n: (torch.randn(n, 5, 8), torch.randn(n, 3, 8))))


# Parameters that are used more than once, outside modules, or through other tensors


class Language(nn.Module):
    """Tied token table and head, learned positions by lookup, and a head that averages over tokens."""

    def __init__(self, length: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Embedding(length, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        hidden = self.tokens(index) + self.positions(torch.arange(index.shape[1]))
        out: Tensor = self.head(self.norm(hidden).tanh())
        return out


class Vision(nn.Module):
    """Patches, a class token, learned positions, layer scale."""

    def __init__(self, repeat: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 7, 8))
        self.scale = nn.Parameter(torch.randn(8))
        self.shift = nn.Parameter(torch.randn(1, 1))
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token.repeat(len(x), 1, 1) if self.repeat else self.token.expand(len(x), -1, -1)
        x = torch.cat([token, x], 1)
        x = (x + self.positions[:, : x.shape[1]]) * self.scale
        return (x - self.shift) / self.shift.exp() + (1 - self.scale)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(x).tanh())
        return out


class RawMatmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight + self.bias).relu() @ self.weight.t()


class Flattened(nn.Module):
    """A linear layer on all tokens in one dimension, those of a sample together or apart."""

    def __init__(self, outer: bool) -> None:
        super().__init__()
        self.linear, self.outer = nn.Linear(6, 5), outer

    def forward(self, x: Tensor) -> Tensor:
        samples = len(x)
        if self.outer:
            return self.linear(x.flatten(0, 1)).unflatten(0, (samples, -1))
        return self.linear(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, samples)).transpose(0, 1)


class Frames(nn.Module):
    """A convolution on the frames of films."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.flatten(0, 1))).unflatten(0, (len(x), -1)).tanh()


class RelativeBias(nn.Module):
    """Attention scores with a learned bias that a fixed index looks up, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 2))
        self.register_buffer("index", torch.arange(4).sub(torch.arange(4).unsqueeze(1)).add(3).flatten())

    def forward(self, x: Tensor) -> Tensor:
        index = self.get_buffer("index")
        bias = self.table[index].view(4, 4, 2).permute(2, 0, 1).contiguous()
        return ((x @ x.mT).unsqueeze(1) + bias.unsqueeze(0)).softmax(-1)


class PositionNetwork(nn.Module):
    """Positions that a network computes from numbers, alike for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.network(torch.arange(4, dtype=x.dtype).unsqueeze(1))
        return out


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).tanh(), self.weight.t())


class Slices(nn.Module):
    """Overlapping parts of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:3]) * F.linear(x, self.weight[1:4]) + F.linear(x, self.weight[2:])


class InPlace(nn.Module):
    def __init__(self, view: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.shift, self.other, self.view = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 6)), view

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).sin()
        if self.view:
            hidden[:, :3] += self.shift[:3]
        else:
            hidden += self.shift
            hidden -= self.other
        out: Tensor = self.last(hidden.relu_())
        return out


SHARED: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "language": (Language, tokens(6)),
    "language, tokens = samples": (lambda: Language(4), tokens(4)),
    "vision": (Vision, images(3, 4, 6)),
    "vision, repeated token": (lambda: Vision(True), images(3, 4, 6)),
    "linear twice": (lambda: Twice(nn.Linear(6, 6)), images(6)),
    "linear twice on sequences": (lambda: Twice(nn.Linear(3, 3)), images(7, 3)),
    "conv twice": (lambda: Twice(nn.Conv2d(3, 3, 3, padding=1)), images(3, 4, 5)),
    "norm twice": (lambda: Twice(nn.LayerNorm(5)), images(3, 5)),
    "embedding twice": (lambda: TwoTables(), tokens(2, 5)),
    "matmul": (RawMatmul, images(3, 6)),
    "flat": (lambda: Flattened(True), images(3, 6)),
    "flat, interleaved": (lambda: Flattened(False), images(3, 6)),
    "flat, tokens = samples": (lambda: Flattened(False), images(4, 6)),
    "frames": (Frames, images(3, 3, 5, 5)),
    "relative bias": (RelativeBias, images(4, 3)),
    "position network": (PositionNetwork, images(4, 6)),
    "position network, longer": (PositionNetwork, images(2, 4, 6)),
    "tied autoencoder": (Autoencoder, images(6)),
    "overlapping slices": (Slices, images(6)),
    "in place": (lambda: InPlace(False), images(3, 6)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), images(6)),
    "weight norm conv": (lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), images(3, 6)),
}


class TwoTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)

    def forward(self, index: Tensor) -> Tensor:
        index = index % 6
        return self.table(index[:, 0]) * self.table(index[:, 1]).tanh()


@pytest.mark.parametrize("name", SHARED)
def test_parameters_used_in_other_ways(name: str) -> None:
    build, draw = SHARED[name]
    coverage = assert_exact(build(), draw)
    assert is_ghost(coverage), coverage


# What no rule covers


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradients[0] * weight**2, (2 * weight * x * gradients[0]).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.weight = nn.Parameter(torch.randn(5))
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(Square.apply(self.first(x), self.weight))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.before, self.cells, self.after = nn.Linear(3, 3), kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.cells(self.before(x))[0])
        return out


class Half(nn.Module):
    """A weight with a use that a rule covers and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(torch.einsum("bi,oi->bo", self.linear(x), self.linear.weight).tanh())
        return out


UNCOVERED: dict[str, tuple[Callable[[], nn.Module], Draw, set[str]]] = {
    "lstm": (lambda: Recurrent(nn.LSTM), images(5, 3), {"cells.weight_ih_l0", "cells.bias_hh_l0"}),
    "gru": (lambda: Recurrent(nn.GRU), images(5, 3), {"cells.weight_hh_l0", "cells.bias_ih_l0"}),
    "custom function": (Custom, images(6), {"weight"}),
    "both": (Half, images(6), {"linear.weight"}),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Linear(5, 2)),
        images(6),
        {"0.parametrizations.weight.original"},
    ),
    "bilinear": (lambda: BilinearOfOne(), images(6), {"bilinear.weight", "bilinear.bias"}),
    "embedding by frequency": (
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=False, max_norm=1.0),
        tokens(4, high=5),
        {"weight"},
    ),
    "in place on a view": (lambda: InPlace(True), images(6), {"shift"}),
    "bag max": (lambda: nn.EmbeddingBag(5, 3, mode="max"), tokens(4, high=5), {"weight"}),
}


class BilinearOfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.last = nn.Bilinear(6, 6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.bilinear(x, x))
        return out


@pytest.mark.parametrize("name", UNCOVERED)
def test_the_rest_is_measured_by_backward(name: str) -> None:
    build, draw, expected = UNCOVERED[name]
    coverage = assert_exact(build(), draw)
    backward = {name for name, how in coverage.items() if how.startswith("per-sample backward: ")}
    assert expected <= backward
    others = {name for name in coverage if not name.startswith("cells.")} - expected
    assert not others & backward


def test_coverage_says_what_was_done() -> None:
    module = Custom()
    module.unused = nn.Linear(2, 2)
    module.last.bias.requires_grad_(False)
    coverage = assert_exact(module, images(6))
    assert coverage == {
        "weight": "per-sample backward: SquareBackward",
        "first.weight": "ghost: linear",
        "first.bias": "ghost: linear",
        "last.weight": "ghost: linear",
        "unused.weight": "unused",
        "unused.bias": "unused",
    }


def test_the_fallback_can_be_refused() -> None:
    module = Custom()
    norms = PerSampleGradientNorms(module, fallback="raise")
    with pytest.raises(RuntimeError, match=r"no rule for: weight \(per-sample backward: SquareBackward\)"):
        norms(lambda: module(torch.randn(3, 6)).sum(1))
    plain = nn.Linear(2, 1)
    PerSampleGradientNorms(plain, fallback="raise")(lambda: plain(torch.ones(3, 2)).sum(1))


def test_frozen_parameters_do_not_count() -> None:
    module = convnet()
    for name in ("0.0.weight", "1.norm1.weight", "3.2.bias", "1.conv2.weight"):
        module.get_parameter(name).requires_grad_(False)
    coverage = assert_exact(module, images(3, 12, 12))
    assert "0.0.weight" not in coverage
    assert is_ghost(coverage)


def test_inputs_may_require_gradients() -> None:
    module = convnet().double().eval()
    inputs = torch.randn(3, 3, 12, 12, dtype=torch.float64, requires_grad=True)

    def compute_losses() -> Tensor:
        return module(inputs * 2).square().sum(1)

    found = PerSampleGradientNorms(module)(compute_losses)
    torch.testing.assert_close(found, reference(module, compute_losses()))
    assert inputs.grad is None


# Where the samples lie


def test_candidates_come_likeliest_first() -> None:
    assert candidates((6, 3, 4), (0, 1, 2), 3) == [Layout(1), Layout(0, True), Layout(0, False)]
    assert candidates((5, 7), (0, 1), 3) == []
    assert candidates((5, 7), (0, 1), 1) == [Layout(None)]


@pytest.mark.parametrize("layout", [Layout(0), Layout(1), Layout(0, True), Layout(0, False)])
def test_layouts_put_samples_first(layout: Layout) -> None:
    x = torch.randn(3, 2, 4)
    laid = {
        (0, True): x.flatten(0, 1),
        (0, False): x.transpose(0, 1).flatten(0, 1),
        (1, True): x.transpose(0, 1),
    }[(layout.dim or 0, layout.outer)]
    split = layout.split(laid, 3)
    assert torch.equal(split.reshape(3, 2, 4), x)
    gradient = layout.split(torch.zeros_like(laid), 3)  # a view of the zeros, as nothing is merged
    gradient[1] = 1
    assert split.shape[0] == gradient.shape[0] == 3


def test_sources_that_share_parameters_are_one_group_in_any_order() -> None:
    roots = ["a", "b", "ab", "c", "d", "cd", "bd", "e", "a"]
    sources = [Source(torch.zeros(()), frozenset(names), 0) for names in roots]
    groups = [["".join(sorted(source.roots)) for source in group] for group in connected(sources)]
    assert sorted(sorted(group) for group in groups) == [["a", "a", "ab", "b", "bd", "c", "cd", "d"], ["e"]]


def test_a_gradient_elsewhere_denies_a_layout() -> None:
    gradient = torch.zeros(6, 2)
    gradient[[2, 3]] = 1.0
    assert belongs_to(Layout(0, True), gradient, 1, 3)
    assert not belongs_to(Layout(0, True), gradient, 0, 3)
    assert not belongs_to(Layout(0, False), gradient, 1, 3)


def test_layouts_are_found_although_first_gradients_are_zero() -> None:
    # The loss of all samples but one is constant, and a zero scale hides what comes before it from all.
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.linear = nn.Linear(6, 6), nn.Linear(6, 5)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear((x + self.gate * self.hidden(x)).transpose(0, 1))
            return out.transpose(0, 1)

    module = Gated().double()
    norms = PerSampleGradientNorms(module)
    for open_gate in (False, True, True):
        nn.init.constant_(module.gate, float(open_gate))
        inputs, counts = torch.randn(4, 4, 6).double(), torch.tensor([0.0, 1.0, 0.0, 0.0])

        def compute_losses(inputs: Tensor = inputs, counts: Tensor = counts) -> Tensor:
            return module(inputs).square().sum((1, 2)) * counts

        torch.testing.assert_close(norms(compute_losses), reference(module, compute_losses()))


@pytest.mark.parametrize("outer", [True, False])
def test_one_token_does_not_tell_how_several_lie(outer: bool) -> None:
    module = Flattened(outer).double()
    norms = PerSampleGradientNorms(module)
    for length in (1, 3, 1, 4):
        inputs = torch.randn(4, length, 6).double()

        def compute_losses(inputs: Tensor = inputs) -> Tensor:
            return module(inputs).square().sum((1, 2))

        torch.testing.assert_close(norms(compute_losses), reference(module, compute_losses()))


def test_inside_vmap() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.func.vmap(lambda row: self.first(row).tanh())(x))
            return out

    coverage = assert_exact(Inside(), images(6))
    assert coverage["last.weight"] == "ghost: linear"
    assert coverage["first.weight"].startswith("per-sample backward")


def test_compiled_modules_run_uncompiled() -> None:
    module, inputs = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), torch.randn(4, 6)
    compiled = torch.compile(module, backend="eager")
    norms = PerSampleGradientNorms(module)
    found = norms(lambda: compiled(inputs).square().sum(1))
    torch.testing.assert_close(found, reference(module, module(inputs).square().sum(1)))
    assert is_ghost(dict(norms.coverage))


def test_a_batch_is_one_forward_and_one_backward_once_the_module_is_known() -> None:
    module, calls = Language().double(), []
    hooks = []

    def compute_losses(samples: int = 4) -> Tensor:
        calls.append(samples)
        out = module(torch.randint(11, (samples, 6)))
        out.register_hook(hooks.append)
        return out.square().mean((1, 2))

    norms = PerSampleGradientNorms(module)
    norms(compute_losses)
    assert len(calls) == 2  # positions are alike for all samples, which the first run shows
    for samples in (4, 3, 1):
        calls.clear()
        hooks.clear()
        norms(lambda samples=samples: compute_losses(samples))
        assert calls == [samples]
        assert len(hooks) == 1


# What is undefined


def test_batch_norm_in_training_mode_is_refused_before_all_else() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(RuntimeError, match=r"undefined for 1 \(BatchNorm1d\) in training mode.*module\.eval\(\)"):
        PerSampleGradientNorms(module)(lambda: pytest.fail("was run"))


def test_batch_norm_without_statistics_is_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False, track_running_stats=False)).eval()
    with pytest.raises(RuntimeError, match="uses the statistics of the batch"):
        PerSampleGradientNorms(module)(lambda: module(torch.randn(5, 3)).square().sum(1))


class Mixing(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        return F.cross_entropy(z @ z.T, torch.arange(len(x)), reduction="none")


@pytest.mark.parametrize("depth", [1, 2])
def test_losses_that_compare_samples_are_refused(depth: int) -> None:
    module = Mixing(depth)
    with pytest.raises(
        RuntimeError, match=r"depends on other samples at linear with layers\.\d\.bias, layers\.\d\.weight"
    ):
        PerSampleGradientNorms(module)(lambda: module(torch.randn(4, 6)))


def test_samples_of_uneven_size_are_left_to_backward() -> None:
    # Nine tokens of three samples: no dimension holds three times as many of each, though the numbers would allow it.
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, owner: Tensor) -> Tensor:
            out = self.last(self.first(x).tanh()).square().sum(1)
            return torch.zeros(3, dtype=x.dtype).index_add(0, owner, out)

    module = Packed().double()
    norms = PerSampleGradientNorms(module)
    for owner in ([0, 1, 1, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 2, 2]):
        inputs, of = torch.randn(len(owner), 6).double(), torch.tensor(owner)

        def compute_losses(inputs: Tensor = inputs, of: Tensor = of) -> Tensor:
            return module(inputs, of)

        torch.testing.assert_close(norms(compute_losses), reference(module, compute_losses()))
    assert all(how.startswith("per-sample backward") for how in norms.coverage.values())


def test_losses_in_another_order() -> None:
    module, inputs = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 2)), torch.randn(4, 6)

    def compute_losses() -> Tensor:
        return module(inputs).square().sum(1).roll(1)

    torch.testing.assert_close(PerSampleGradientNorms(module)(compute_losses), reference(module, compute_losses()))


def test_inputs_overwritten_after_their_use_are_refused() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x)
            x.zero_()
            return out

    module = Overwrites()
    with pytest.raises(RuntimeError, match="changed in place"):
        PerSampleGradientNorms(module)(lambda: module(torch.randn(4, 3)).square().sum(1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused(reentrant: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def compute_losses() -> Tensor:
        hidden = checkpoint(lambda x: module[1](x.tanh()).tanh(), module[0](torch.randn(5, 3)), use_reentrant=reentrant)
        return module[2](hidden).square().sum(1)

    with pytest.raises(RuntimeError, match="Turn activation checkpointing off"):
        PerSampleGradientNorms(module)(compute_losses)


@pytest.mark.parametrize("wrong", [lambda out: out.mean(), lambda out: out, lambda out: 1.0, lambda out: out[:0, 0]])
def test_losses_must_be_one_for_each_sample(wrong: Callable[[Tensor], Any]) -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="one loss for each sample"):
        PerSampleGradientNorms(module)(lambda: wrong(module(torch.randn(4, 3))))


def test_constructor_refuses() -> None:
    with pytest.raises(ValueError, match="fallback must be 'auto' or 'raise'; got 'none'"):
        PerSampleGradientNorms(nn.Linear(2, 2), fallback="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReLU has none"):
        PerSampleGradientNorms(nn.ReLU())


# Precision, randomness, and what is left


def test_low_precision_adds_up_in_float32() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).bfloat16()
    inputs = torch.randn(8, 64).bfloat16()
    found = PerSampleGradientNorms(module)(lambda: module(inputs).square().sum(1))
    assert found.dtype == torch.float32
    module.float()
    expected = reference(module, module(inputs.float()).square().sum(1))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("around", [True, False])
def test_autocast(around: bool) -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))
    inputs = torch.randn(8, 16)

    def compute_losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(inputs).float().square().sum(1)

    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        found = PerSampleGradientNorms(module)(compute_losses)
    expected = reference(module, compute_losses())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.0)


def test_runs_of_one_batch_see_the_same_random_numbers() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), Half())
    inputs, drawn = torch.randn(4, 6), []

    def compute_losses() -> Tensor:
        drawn.append(torch.get_rng_state())
        return module(inputs).square().sum(1)

    torch.manual_seed(1)
    found = PerSampleGradientNorms(module)(compute_losses)
    assert len(drawn) > 1
    assert all(torch.equal(state, drawn[0]) for state in drawn)
    torch.manual_seed(1)
    torch.testing.assert_close(found, reference(module, compute_losses()), rtol=1e-4, atol=0.0)


def test_under_no_grad() -> None:
    module, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad():
        found = PerSampleGradientNorms(module)(lambda: module(inputs).square().sum(1))
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, reference(module, module(inputs).square().sum(1)))
    assert not found.requires_grad


def test_in_inference_mode() -> None:
    module, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.inference_mode():
        found = PerSampleGradientNorms(module)(lambda: module(inputs).square().sum(1))
    torch.testing.assert_close(found, reference(module, module(inputs).square().sum(1)))


def test_losses_without_a_graph_are_refused() -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="these do not require grad"):
        PerSampleGradientNorms(module)(lambda: module(torch.randn(4, 3)).sum(1).detach())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left(fails: bool) -> None:
    module = nn.Sequential(convnet(), Custom2(), nn.Linear(3, 2)).eval()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    kept: list[Tensor] = []
    fast = torch.backends.mha.get_fastpath_enabled()

    def compute_losses() -> Tensor:
        out = module(torch.ones(3, 3, 12, 12))
        kept.append(out)
        if fails:
            raise KeyboardInterrupt
        return out.square().sum(1)

    norms = PerSampleGradientNorms(module)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            norms(compute_losses)
    else:
        norms(compute_losses)
    assert torch.overrides._get_current_function_mode() is None
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(
        torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in module.parameters() if p.grad is not None
    )
    assert all(p.grad is not None and not p._backward_hooks for p in module.parameters())
    assert all(not out._backward_hooks for out in kept)
    assert all(not child._forward_hooks and not child._backward_hooks for child in module.modules())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


class Custom2(nn.Module):
    """One parameter that is left to autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Square.apply(x, self.weight)
        return out


# Against another library


OPACUS = ["sequence", "conv strided", "conv depthwise", "conv3d", "layer norm", "group norm", "embedding"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
@pytest.mark.parametrize(
    "name", ["sequence", "conv strided", "conv depthwise", "conv3d", "layer norm", "group norm", "embedding"]
)
def test_opacus_agrees(name: str) -> None:
    opacus = pytest.importorskip("opacus")
    build, draw = COVERED[name]
    module = build()
    inputs = draw(5)
    found = PerSampleGradientNorms(module)(lambda: module(*inputs).square().flatten(1).sum(1))
    wrapped = opacus.GradSampleModule(module, loss_reduction="sum")
    wrapped(*inputs).square().sum().backward()
    squares = sum(p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters())
    torch.testing.assert_close(found, squares.sqrt(), rtol=1e-4, atol=0.0)
