"""LoRA against a module written by hand; its start, its layers, what it refuses, and what it works next to."""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad.callbacks import (
    LearnedRounding,
    Lookahead,
    LoRA,
    LowRankFinetuning,
    NMSparsity,
    QuantizationAwareTraining,
    ZerothOrder,
)
from lightning_grad.testing import assert_identical, make_trainer, on_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]
WIDTH, CLASSES, BATCH = 12, 5, 8
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6 * BATCH, WIDTH, generator=GENERATOR)
Y = torch.randint(CLASSES, (6 * BATCH,), generator=GENERATOR)


class Net(pl.LightningModule):
    """A backbone and a head, with SGD on all parameters."""

    def __init__(self, lr: float = 0.1, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, CLASSES)
        self.lr, self.factor = lr, factor
        self.validated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.factor * F.cross_entropy(self(batch[0]), batch[1])

    def on_validation_start(self) -> None:
        self.validated = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self(batch[0]).detach().clone())
        self.log("val_loss", F.cross_entropy(self.validated[-1], batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), BATCH, shuffle=shuffle)


def run(*callbacks: Any, module: Any = None, ckpt: Any = None, **arguments: Any) -> Any:
    module = Net() if module is None else module
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        arguments["enable_checkpointing"] = True
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 2, **arguments})
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt)
    return module


class AtStart(pl.Callback):
    """Compares the module with the pretrained one before the first step."""

    def __init__(self) -> None:
        self.difference = math.nan
        self.state: Any = None
        self.random: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0:
            self.random = torch.get_rng_state()
            self.modes = {name: child.training for name, child in pl_module.named_modules()}
            self.buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
            with torch.no_grad():
                self.difference = float((copy.deepcopy(pl_module).eval()(X) - type(pl_module)().eval()(X)).abs().max())
                adapted = {name: child for name, child in pl_module.named_modules() if isinstance(child, nn.Linear)}
                self.outputs = {n: c(torch.ones(2, c.in_features)) for n, c in adapted.items()}


# Against modules written by hand.


class ByHand(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), scale
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.layer(x), F.linear(F.linear(x, self.a), self.b), alpha=self.scale)


class Factors(pl.Callback):
    """Keeps the adapters at the first batch and at the end."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def _own(self, pl_module: Any) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in pl_module.named_parameters() if "lora" in name}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.first = self.first or self._own(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.last = self._own(pl_module)


def test_it_trains_as_a_module_with_adapters_written_by_hand() -> None:
    factors = Factors()
    run(LoRA(3, 6.0), factors)
    hand = Net()
    hand.backbone[1].requires_grad_(False)
    for parent, key, name in ((hand.backbone, 0, "backbone.0"), (hand.backbone, 3, "backbone.3")):
        a, b = (factors.first[f"{name}.weight_lora_{each}"] for each in "AB")
        parent[key] = ByHand(parent[key], a, b, 2.0)
    hand.head = ByHand(hand.head, factors.first["head.weight_lora_A"], factors.first["head.weight_lora_B"], 2.0)
    run(module=hand)
    for name, layer in (("backbone.0", hand.backbone[0]), ("backbone.3", hand.backbone[3]), ("head", hand.head)):
        assert torch.equal(factors.last[f"{name}.weight_lora_A"], layer.a)
        assert torch.equal(factors.last[f"{name}.weight_lora_B"], layer.b)


def test_only_adapters_and_named_parameters_move() -> None:
    start, module = Net(), Net()
    shapes: set[Any] = set()

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            shapes.update(tuple(p.shape) for p in held if p.grad is not None)

    run(LoRA(2, include=["backbone.3"], also_train=["head.bias"]), Keep(), module=module)
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, start.get_parameter(name))]
    assert moved == ["backbone.3.weight", "head.bias"]
    change = module.backbone[3].weight - start.backbone[3].weight
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == 2
    assert shapes == {(2, 16), (16, 2), (CLASSES,)}, "gradients of A, B and the bias only"
    assert all(p.requires_grad for p in module.parameters())


# The start.


@pytest.mark.parametrize(("init", "limit"), [("default", 0.0), ("ga", 1e-5)])
def test_the_start_computes_what_the_pretrained_module_does(init: Any, limit: float) -> None:
    start = AtStart()
    run(LoRA(2, init=init), start)
    assert start.difference <= limit
    for name, layer in Net().named_modules():
        if name in start.outputs:
            expected = layer(torch.ones(2, layer.in_features))
            assert float((start.outputs[name] - expected).detach().abs().max()) <= limit, "the two products, too"


class Small(pl.LightningModule):
    """One matrix, with plain gradient descent, whose first step is seen in the weights after the fit."""

    def __init__(self, factor: float = 1.0, lr: float = 1e-3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.factor, self.lr = nn.Linear(WIDTH, 16), nn.Linear(16, 14), factor, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.factor * F.cross_entropy(self.last(torch.tanh(self.first(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr / self.factor)


def gradient_of(factor: float = 1.0) -> Tensor:
    module = Small(factor).double()
    module.training_step((X.double(), Y), 0).backward()
    assert module.last.weight.grad is not None
    return module.last.weight.grad


def first_change(init: Any, rank: int, factor: float = 1.0) -> Tensor:
    module = Small(factor)
    before = module.last.weight.detach().double().clone()
    data = DataLoader(TensorDataset(X, Y), len(X))
    trainer = make_trainer(callbacks=[LoRA(rank, init=init, include=["last"])], max_steps=1, precision="64-true")
    trainer.fit(module, data)
    return module.last.weight.detach().double() - before


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_first_step_of_ga_is_the_best_that_an_adapter_can_make(rank: int) -> None:
    gradient = gradient_of()
    values = torch.linalg.svdvals(gradient).square()
    bound = float((values[: 2 * rank].sum() / values.sum()).sqrt())

    def cosine(init: Any) -> float:
        return float(F.cosine_similarity(first_change(init, rank).flatten(), -gradient.flatten(), dim=0))

    assert cosine("ga") == pytest.approx(bound, abs=1e-3)
    assert cosine("default") < bound - 0.05


@pytest.mark.parametrize("factor", [1e-2, 1e2])
def test_ga_does_not_depend_on_the_scale_of_the_loss(factor: float) -> None:
    usual, scaled = first_change("ga", 2), first_change("ga", 2, factor)
    assert torch.allclose(usual, scaled, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_ga_leaves_no_trace_of_its_gradients() -> None:
    plain, usual = AtStart(), AtStart()
    for start, callbacks in ((plain, []), (usual, [LoRA(2, init="ga")])):
        module = Net()
        module.backbone.insert(1, nn.Dropout(0.3))
        module.backbone[2].eval()  # frozen statistics stay so
        pl.seed_everything(3, verbose=False)
        generator = torch.Generator().manual_seed(5)
        data = DataLoader(TensorDataset(X, Y), BATCH, shuffle=True, generator=generator)
        trainer = make_trainer(callbacks=[*callbacks, _first(start)], max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(module, data)
        start.state = generator.get_state()
    assert torch.equal(plain.random, usual.random)
    assert torch.equal(plain.state, usual.state)
    assert_identical(plain.buffers, usual.buffers)
    assert plain.modes == usual.modes


def _first(start: AtStart) -> pl.Callback:
    class First(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 0:
                start.random = torch.get_rng_state()
                start.modes = {name: child.training for name, child in pl_module.named_modules()}
                start.buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    return First()


def test_ga_averages_over_ranks() -> None:
    one = Factors()
    run(LoRA(2, init="ga", init_batches=6, include=["last"]), one, module=Small(), max_steps=1)

    def fit() -> Any:
        factors = Factors()
        run(LoRA(2, init="ga", init_batches=3, include=["last"]), factors, module=Small(), max_steps=1, **RANKS)
        return factors.first

    found = on_ranks(2, fit)
    assert_identical(found[0], found[1])
    for name, value in found[0].items():
        product = value.t() @ value if name.endswith("A") else value @ value.t()
        expected = one.first[name]
        expected = expected.t() @ expected if name.endswith("A") else expected @ expected.t()
        assert torch.allclose(product, expected, atol=1e-4), "the same subspace as from all samples on one rank"


RANKS: dict[str, Any] = {"strategy": "ddp", "devices": 2}


@pytest.mark.parametrize(
    ("init", "rank", "words"), [("ga", 4, "head.weight (2)"), ("default", 8, "head.weight (5)")], ids=["ga", "default"]
)
def test_a_rank_that_does_not_fit_is_lowered_and_named(init: Any, rank: int, words: str, monkeypatch: Any) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_grad.core.callback.rank_zero_info", lines.append)
    factors = Factors()
    run(LoRA(rank, init=init), factors, max_steps=1)
    assert any("uses a smaller rank" in line and words in line for line in lines), lines
    assert len(factors.first["head.weight_lora_A"]) == (2 if init == "ga" else 5)
    assert len(factors.first["backbone.3.weight_lora_A"]) == rank


def test_ga_uses_full_batches_only() -> None:
    """Here the last batch would have one sample, of which BatchNorm has no variance."""
    data = TensorDataset(X[: 2 * BATCH + 1], Y[: 2 * BATCH + 1])
    trainer = make_trainer(callbacks=[LoRA(2, init="ga")], max_epochs=1)
    trainer.fit(Net(), DataLoader(data, BATCH, drop_last=True))
    assert trainer.global_step == 2


class Seen(TensorDataset):
    """Notes which samples are read."""

    def __init__(self) -> None:
        super().__init__(X, Y)
        self.seen: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.seen.append(index)
        return super().__getitem__(index)

    __getitems__ = None  # single samples


def test_ga_reads_random_samples() -> None:
    """Evenly spaced ones would be of one kind if the kinds take turns."""
    data = Seen()
    trainer = make_trainer(callbacks=[LoRA(2, init="ga", init_batches=1)], max_steps=1)
    trainer.fit(Net(), DataLoader(data, BATCH))
    first = data.seen[:BATCH]
    assert len(set(first)) == BATCH
    assert len({index % (len(data) // BATCH) for index in first}) > 1
    assert max(first) >= BATCH


def test_ga_with_a_batch_sampler_of_unknown_size() -> None:
    class Pairs:
        def __iter__(self) -> Any:
            return iter([[0, 1], [2, 3], [4, 5]])

        def __len__(self) -> int:
            return 3

    trainer = make_trainer(callbacks=[LoRA(2, init="ga")], max_epochs=1)
    trainer.fit(Net(), DataLoader(TensorDataset(X, Y), batch_sampler=Pairs()))
    assert trainer.global_step == 3


def test_layers_that_no_batch_reaches_start_as_usual() -> None:
    module = Net()
    module.unused = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match=r"gradients of unused\.weight are 0 or not finite"):
        run(LoRA(2, init="ga"), module=module, max_steps=2)


# Layers.


class Images(pl.LightningModule):
    """Convolutions of several kinds and attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.same = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect")
        self.strided = nn.Conv2d(6, 8, 3, stride=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(8, 8, 1, groups=4)
        self.line = nn.Conv1d(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(self.strided(torch.tanh(self.same(x))))).flatten(2)
        x = self.line(x).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated = self(batch[0]).detach().clone()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


IMAGES = torch.randn(16, 2, 9, 9, generator=GENERATOR)


class Trained(pl.Callback):
    """Compares the training path with the merged weights at the last batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        merged = copy.deepcopy(pl_module)  # a copy is a plain module with merged weights
        self.kinds = {type(child) for child in merged.modules()}
        with torch.no_grad():
            self.difference = float((pl_module(IMAGES) - merged(IMAGES)).abs().max())
            self.change = float((merged(IMAGES) - Images()(IMAGES)).abs().max())


@pytest.mark.parametrize("init", ["default", "ga"])
def test_convolutions_and_attention(init: Any) -> None:
    module, trained, start = Images(), Trained(), Images()
    data = DataLoader(TensorDataset(IMAGES, Y[:16]), 8)
    make_trainer(callbacks=[LoRA(2, init=init), trained], max_epochs=3).fit(module, data, DataLoader(data.dataset, 16))
    assert trained.difference < 1e-5 < 1e-3 < trained.change
    assert trained.kinds == {type(child) for child in start.modules()}
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert moved == {
        "same.weight",
        "strided.weight",
        "line.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }, "the convolution with groups stays frozen"
    with torch.no_grad():
        assert torch.equal(module.eval()(IMAGES), module.validated)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_models_of_hugging_face(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    module, start = Language(kind, transformers), Language(kind, transformers)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(30, (16, 6), generator=generator), torch.arange(16) % 2
    data = DataLoader(TensorDataset(tokens, labels), 8)
    keys = list(module.state_dict())
    make_trainer(
        callbacks=[LoRA(2, init="ga", also_train=["*.classifier"] if kind == "bert" else None)], max_epochs=2
    ).fit(module, data, data)
    assert list(module.state_dict()) == keys
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    if kind == "gpt2":
        assert moved == {f"model.transformer.h.{i}.{n}.weight" for i in range(2) for n in CONV1D}
        assert module.model.lm_head.weight is module.model.transformer.wte.weight
    else:
        assert moved >= {"model.classifier.weight", "model.classifier.bias", "model.bert.pooler.dense.weight"}
        assert not [name for name in moved if "embeddings" in name or "LayerNorm" in name]
    with torch.no_grad():
        assert torch.equal(module.eval().model(tokens[8:]).logits, module.validated)


CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Language(pl.LightningModule):
    """A tiny model of transformers with random weights."""

    def __init__(self, kind: str, transformers: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        if kind == "gpt2":
            config = transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2)
            self.model = transformers.GPT2LMHeadModel(config)
        else:
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, **sizes)
            self.model = transformers.BertForSequenceClassification(config)
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0], labels=batch[0] if self.kind == "gpt2" else batch[1]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated = self.model(batch[0]).logits.clone()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_gpt2_layers_compute_two_small_products() -> None:
    """Not the gradient of the whole weight, which would cost as much as full fine-tuning."""
    transformers = pytest.importorskip("transformers")
    shapes: set[Any] = set()

    class Shapes(pl.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            pending, seen = [loss.grad_fn], set()
            while pending:
                node = pending.pop()
                if node is not None and node not in seen:
                    seen.add(node)
                    pending += [parent for parent, _ in node.next_functions]
                    if type(node).__name__ == "AccumulateGrad":
                        shapes.add(tuple(node.variable.shape))

    tokens = torch.randint(30, (8, 6))
    data = DataLoader(TensorDataset(tokens, tokens), 8)
    make_trainer(callbacks=[LoRA(2), Shapes()], max_epochs=1).fit(Language("gpt2", transformers), data)
    assert all(2 in shape for shape in shapes)


def test_a_layer_with_its_own_forward_is_right_too() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.relu(3 * F.linear(input, self.weight, self.bias))

    module = Net()
    module.backbone[3] = Scaled(16, 16)
    start = copy.deepcopy(module)
    run(LoRA(2), module=module)
    assert torch.equal(module.eval()(X[-BATCH:]), module.validated[-1])
    change = module.backbone[3].weight - start.backbone[3].weight
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == 2


# What it refuses.


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    "other",
    [NMSparsity("2:4", include=["backbone.3"]), QuantizationAwareTraining(4, include=["backbone.3"])],
    ids=["sparse", "quantized"],
)
def test_a_layer_with_a_view_is_refused_by_name(other: Any, is_first: bool) -> None:
    callbacks = [LoRA(2), copy.deepcopy(other)]
    with pytest.raises(ValueError, match=r"both choose backbone\.3\.weight \(Linear\)"):
        run(*(callbacks if is_first else callbacks[::-1]))


def test_views_of_other_layers_work_next_to_it() -> None:
    module = run(LoRA(2, exclude=["head"], also_train=["head"]), NMSparsity("2:4", include=["head"]))
    assert bool((module.head.weight.view(-1, 4).ne(0).sum(1) <= 2).all())
    assert torch.equal(module.eval()(X[-BATCH:]), module.validated[-1])


def test_rounding_an_adapted_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="both choose"):
        run(LoRA(2), LearnedRounding(4, samples=8, steps=1, include=["backbone.3"]))


def test_pruning_an_adapted_layer_is_refused() -> None:
    module = Net()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(module.head, "weight")], amount=0.5)
    with pytest.raises(Exception, match=r"LoRA and ModelPruning would both change head\.weight|weight"):
        run(LoRA(2), pruning, module=module)


def test_optimizers_that_choose_parameters_by_name_are_refused() -> None:
    class ByName(Net):
        def configure_optimizers(self) -> Any:
            chosen = [p for name, p in self.named_parameters() if name.endswith((".weight", ".bias"))]
            return torch.optim.SGD(chosen, lr=0.1)

    with pytest.raises(ValueError, match=r"an adapter of backbone\.0\.weight, but no optimizer holds it"):
        run(LoRA(2), module=ByName())


def test_a_tied_weight_is_skipped_or_refused_by_name() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(CLASSES, 16)
            self.head.weight = self.table.weight

    module = Tied()
    run(LoRA(2), module=module)
    assert torch.equal(module.head.weight, Tied().head.weight)
    with pytest.raises(ValueError, match=r"found no weight to adapt\. .*head\.weight: tied to table\.weight"):
        run(LoRA(2, include=["head"]), module=Tied())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"include": ["bakbone"]}, "no parameter or module is named 'bakbone'. Did you mean 'backbone'"),
        ({"also_train": ["heads"]}, "also_train=.*no parameter or module is named 'heads'"),
        ({"include": ["backbone.1"]}, "found no weight to adapt"),
        ({"include": ["head"], "also_train": ["head"]}, "found no weight to adapt"),
    ],
)
def test_names_that_do_not_fit(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(LoRA(2, **arguments))


def test_frozen_layers_are_adapted_if_named() -> None:
    module = Net()
    module.backbone.requires_grad_(False)
    run(LoRA(2), module=module)
    assert torch.equal(module.backbone[3].weight, Net().backbone[3].weight)
    run(LoRA(2, include=["backbone.3"]), module=module)
    assert not torch.equal(module.backbone[3].weight, Net().backbone[3].weight)
    assert not any(p.requires_grad for p in module.backbone.parameters())


def test_what_trains_too_must_not_be_frozen() -> None:
    module = Net()
    module.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"LoRA\(also_train=...\): the module has frozen 'head'\. Call requires_grad_"):
        run(LoRA(2, also_train=["backbone.0", "head"]), module=module)
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]
    module.head.bias.requires_grad_(True)
    run(LoRA(2, also_train=["head"]), module=module)
    assert not torch.equal(module.head.bias, Net().head.bias)


def test_two_instances_on_one_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"both choose head\.weight"):
        run(LoRA(2), LoRA(2, include=["head"], name="head"))


def test_averaged_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"and Lookahead saves averages"):
        run(LoRA(2), Lookahead())


def test_ga_needs_indices_and_one_loader() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(zip(X, Y, strict=True))

    trainer = make_trainer(callbacks=[LoRA(2, init="ga")], max_epochs=1)
    with pytest.raises(TypeError, match="LoRA reads samples by their index"):
        trainer.fit(Net(), DataLoader(Stream(), BATCH))
    make_trainer(callbacks=[LoRA(2)], max_epochs=1).fit(Net(), DataLoader(Stream(), BATCH))
    trainer = make_trainer(callbacks=[LoRA(2, init="ga")], max_epochs=1)
    with pytest.raises(ValueError, match=r"needs a single training loader; got several\. Use init='default'"):
        trainer.fit(Net(), {"a": loader(), "b": loader()})


def test_an_error_in_a_step_for_ga_is_raised_with_a_note() -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ZeroDivisionError("broken")

    module = Broken()
    with pytest.raises(ZeroDivisionError) as caught:
        run(LoRA(2, init="ga"), module=module)
    assert "gradients for init='ga'" in caught.value.__notes__[0]
    assert all(p.requires_grad for p in module.parameters())
    assert type(module.head) is nn.Linear


# Next to others.


@pytest.mark.parametrize("later", [1, 2])
def test_backbone_finetuning_starts_the_adapters_later(later: int) -> None:
    class Filtered(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    changed: list[list[str]] = []

    class Note(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            own = {n: p for n, p in pl_module.named_parameters() if n.endswith("lora_B")}
            changed.append([name for name, p in own.items() if bool(p.any())])
            assert not any(p.requires_grad for n, p in pl_module.named_parameters() if "lora" not in n), (
                "W stays frozen"
            )

    module, start = Filtered(), Net()
    finetuning = BackboneFinetuning(later, lambda epoch: 1.0, backbone_initial_ratio_lr=1.0)
    run(LoRA(2), finetuning, Note(), module=module, max_epochs=3)
    body = ["backbone.0.weight_lora_B", "backbone.3.weight_lora_B"]
    expected = [["head.weight_lora_B"]] * later + [[*body, "head.weight_lora_B"]] * (3 - later)
    assert changed == expected
    assert torch.equal(module.backbone[0].bias, start.backbone[0].bias)
    assert torch.equal(module.eval()(X[-BATCH:]), module.validated[-1])


def test_resuming_next_to_backbone_finetuning(tmp_path: Any) -> None:
    class Filtered(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)

    def parts(folder: Any) -> Any:
        finetuning = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_ratio_lr=1.0)
        return LoRA(2), finetuning, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)

    whole = run(*parts(tmp_path), module=Filtered(), max_epochs=4)
    # From later epochs, a run with BackboneFinetuning alone does not resume exactly: it freezes the backbone again.
    again = run(*parts(tmp_path / "again"), module=Filtered(), max_epochs=4, ckpt=tmp_path / "epoch=0.ckpt")
    assert_identical(dict(whole.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("strategy", ["ddp_powersgd", "ddp_dgc", "ddp_local_sgd"])
def test_compressed_strategies(strategy: str) -> None:
    from lightning_grad.strategies import DGCStrategy, LocalSGDStrategy, PowerSGDStrategy

    kinds: dict[str, Any] = {
        "ddp_powersgd": lambda: PowerSGDStrategy(rank=1, min_numel=16),
        "ddp_dgc": lambda: DGCStrategy(ratio=0.1, warmup_steps=1, min_numel=16),
        "ddp_local_sgd": LocalSGDStrategy,
    }

    def fit() -> Any:
        module = run(LoRA(5), strategy=kinds[strategy](), devices=2)
        return {name: value.clone() for name, value in module.state_dict().items()}

    first, second = on_ranks(2, fit)
    names = [name for name in first if "running" not in name]
    assert_identical({name: first[name] for name in names}, {name: second[name] for name in names})
    assert not torch.equal(first["head.weight"], Net().head.weight)


def test_zeroth_order_steps_train_adapters() -> None:
    module, start = Net(), Net()
    run(LoRA(2, include=["backbone.3"]), ZerothOrder(1e-2), module=module)
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, start.get_parameter(name))]
    assert moved == ["backbone.3.weight"]


# Checkpoints.


def test_an_exception_leaves_the_trained_weights() -> None:
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 4:
                with torch.no_grad():
                    self.logits = copy.deepcopy(pl_module).eval()(X)
                raise ZeroDivisionError

    module, stop = Net(), Stop()
    with pytest.raises(ZeroDivisionError):
        run(LoRA(2), stop, module=module)
    assert torch.equal(module.eval()(X), stop.logits)
    assert type(module.head) is nn.Linear
    assert not torch.equal(module.head.weight, Net().head.weight)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_other_precisions_validate_what_they_save(precision: Any, tmp_path: Any) -> None:
    saving = ModelCheckpoint(tmp_path, "last")
    module = run(LoRA(2, init="ga"), saving, precision=precision, log_every_n_steps=1)
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    plain = Net().to(weights["head.weight"].dtype).eval()
    plain.load_state_dict(weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        assert torch.equal(plain(X[-BATCH:].to(plain.head.weight)), module.validated[-1])


@pytest.mark.parametrize(
    ("technique", "limit"),
    [(LoRA(2), 0.0), (LoRA(2, init="ga"), 0.0), (LowRankFinetuning(0.6), 1e-5)],
    ids=["default", "ga", "low-rank"],
)
def test_weights_that_are_loaded_in_a_fit_are_those_of_the_module(technique: Any, limit: float) -> None:
    class LoadsBest(Net):
        best: Any

        def on_validation_end(self) -> None:
            if self.trainer.current_epoch == 0:
                self.best = copy.deepcopy(dict(self.state_dict()))

        def on_train_end(self) -> None:
            self.load_state_dict(self.best)
            assert_close(self.state_dict(), self.best)

    def assert_close(found: Any, expected: Any) -> None:
        assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) <= limit

    module = run(technique, module=LoadsBest(), max_epochs=2)
    assert_close(module.state_dict(), module.best)


@pytest.mark.parametrize("kind", [LoRA, LowRankFinetuning])
def test_weights_that_do_not_fit_leave_the_adapters(kind: Any) -> None:
    class LoadsWrong(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            with pytest.raises(
                RuntimeError, match=r"size mismatch for backbone\.3\.weight: .* is torch.Size\(\[16, 16\]\)"
            ):
                self.load_state_dict({**self.state_dict(), "backbone.3.weight": torch.zeros(2, 2)})
            assert not self.load_state_dict({}, strict=False).unexpected_keys

    expected = run(kind(include=["backbone.3"]))
    found = run(kind(include=["backbone.3"]), module=LoadsWrong())
    assert_identical(dict(found.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize(
    "technique", [LoRA(2), LoRA(2, init="ga"), LowRankFinetuning(0.6)], ids=["default", "ga", "low-rank"]
)
def test_a_layer_that_is_used_twice_resumes_exactly(technique: Any, tmp_path: Any) -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.backbone[3]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.backbone(x)))

    def parts(folder: Any) -> Any:
        return copy.deepcopy(technique), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)

    whole = run(*parts(tmp_path), module=Twice())
    again = run(*parts(tmp_path / "again"), module=Twice(), ckpt=tmp_path / "epoch=0.ckpt")
    assert_identical(dict(whole.state_dict()), dict(again.state_dict()))


@pytest.mark.parametrize("technique", [LoRA(2, init="ga"), LowRankFinetuning(0.6)], ids=["ga", "low-rank"])
def test_a_search_of_the_learning_rate_leaves_the_adapters(technique: Any, tmp_path: Any) -> None:
    search = LearningRateFinder(num_training_steps=4, update_attr=False)
    first = run(technique)
    second = run(search, copy.deepcopy(technique), ModelCheckpoint(tmp_path), default_root_dir=tmp_path)
    assert_identical(dict(first.state_dict()), dict(second.state_dict()))


def test_a_checkpoint_after_the_fit_cannot_be_resumed(tmp_path: Any) -> None:
    module = Net()
    trainer = make_trainer(callbacks=[LoRA(2)], max_epochs=1)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    Net().load_state_dict(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], strict=True)
    with pytest.raises(ValueError, match="saved after the fit, when the adapters had been merged"):
        run(LoRA(2), ckpt=tmp_path / "after.ckpt")


@pytest.mark.parametrize("setting", [{"rank": 3}, {"alpha": 1.0}, {"also_train": ["head"]}])
def test_settings_that_cannot_change(setting: Any, tmp_path: Any) -> None:
    run(LoRA(2, 4.0), ModelCheckpoint(tmp_path, "{epoch}"), max_epochs=1)
    with pytest.raises(ValueError, match="cannot change because"):
        run(LoRA(**{"rank": 2, "alpha": 4.0, **setting}), ckpt=tmp_path / "epoch=0.ckpt")


def test_second_fit_starts_from_the_merged_weights() -> None:
    lora, module = LoRA(2), Net()
    run(lora, module=module)
    first = copy.deepcopy(dict(module.state_dict()))
    run(lora, module=module)
    change = module.backbone[3].weight - first["backbone.3.weight"]
    assert int(torch.linalg.matrix_rank(change.detach(), atol=1e-5)) == 2
