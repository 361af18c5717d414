"""Every refusal names a way out that works: first the words, then the fit of a user who has followed them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_grad import callbacks as lg
from lightning_grad.functional.torch_version import TORCH
from lightning_grad.strategies import DGCStrategy, PowerSGDStrategy
from lightning_grad.testing import BATCH, loaders, make_classifier, make_data, make_trainer, on_ranks
from tests.contract import odd_projects as odd

REFUSALS = (ValueError, TypeError, RuntimeError, FileNotFoundError)
VALIDATION = object()  # the ordinary loader


@dataclass
class Fit:
    """All that a fit is made of."""

    callbacks: list[Any] = field(default_factory=list)
    module: Any = None
    train: Any = None
    validation: Any = VALIDATION
    arguments: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        module = make_classifier() if self.module is None else self.module
        trainer = make_trainer(callbacks=self.callbacks, **{"max_epochs": 2, **self.arguments})
        train, validation = loaders()
        trainer.fit(
            module,
            train if self.train is None else self.train,
            validation if self.validation is VALIDATION else self.validation,
        )
        assert trainer.global_step > 0
        assert trainer.state.finished


def fit(*callbacks: Any, module: Any = None, train: Any = None, validation: Any = VALIDATION, **arguments: Any) -> Fit:
    """Return the fit of these callbacks, of the ordinary classifier and its data where nothing else is given."""
    return Fit(list(callbacks), module, train, validation, arguments)


Build = Callable[[Path], Fit]


@dataclass(frozen=True)
class Row:
    """What a user has, the words of the refusal, and what the user has after following them."""

    name: str
    has: Build
    words: str
    changed: Build

    def __str__(self) -> str:
        return self.name


def norms(pl_module: Any, batch: Any) -> Tensor:
    return pl_module(batch[0]).norm(dim=1)


def scalar(pl_module: Any, batch: Any) -> Tensor:
    return norms(pl_module, batch).mean()


def scores_of(path: Path, **arguments: Any) -> str:
    """Write a score file by a fit, and return its path."""
    settings = {"epoch": 1, "save_scores": str(path), **arguments}
    fit(lg.DataPruning(0.3, **settings)).run()
    return str(path)


def other_scores(path: Path) -> str:
    fit(lg.DataPruning(0.3, epoch=1, save_scores=str(path)), train=odd.loader(make_data(5))).run()
    return str(path)


def both() -> dict[str, Any]:
    return {"a": odd.loader(), "b": odd.loader(make_data(1))}


HIDDEN: dict[str, Any] = {"pattern": "2:4", "include": ["hidden"], "figure": False}
STAGES: list[Any] = [[0.0, "3:4"], [0.5, "2:4"]]


def nm(**changes: Any) -> Any:
    return lg.NMSparsity(**{**HIDDEN, **changes})


def lr(**changes: Any) -> Any:
    return lg.AccuracyGradientLR(**{"figure": False, **changes})


def attack(**changes: Any) -> Any:
    return lg.AdversarialTraining(**{"epsilon": 0.1, "check_every_n_epochs": None, **changes})


def evaluation(**changes: Any) -> Any:
    return lg.AdversarialEvaluation(**{"epsilon": 0.1, "steps": 1, **changes})


def qat(bits: Any = 4, **changes: Any) -> Any:
    return lg.QuantizationAwareTraining(bits, **{"include": ["hidden"], **changes})


def pruning(prune: Any = 0.3, **changes: Any) -> Any:
    return lg.DataPruning(prune, **{"epoch": 1, **changes})


SPARSITY = [
    Row(
        "a name with a letter too few",
        lambda _: fit(nm(include=["hiden"])),
        r"NMSparsity\(include=...\).*Did you mean 'hidden'",
        lambda _: fit(nm()),
    ),
    Row(
        "all excluded",
        lambda _: fit(nm(exclude=["hidden"])),
        r"found no weight.*hidden.weight: excluded.*Choose other layers with include=",
        lambda _: fit(nm(include=["encoder"], exclude=["hidden"])),
    ),
    Row(
        "groups that do not divide",
        lambda _: fit(nm(pattern="2:5")),
        r"dimension 1 has size 16, which is not a multiple of 5. Choose other layers with include=, or set another pattern",
        lambda _: fit(nm(pattern="2:8")),
    ),
    Row(
        "layers frozen at the start",
        lambda _: fit(nm(include=None), module=odd.partly_frozen()),
        r"To choose frozen layers, name them, such as include=\['encoder",
        lambda _: fit(nm(include=["hidden"]), module=odd.partly_frozen()),
    ),
    Row(
        "one weight twice",
        lambda _: fit(nm(), nm(name="b")),
        r"both choose hidden.weight .*Separate them: set include= or exclude=",
        lambda _: fit(nm(), nm(name="b", include=["encoder"])),
    ),
    Row(
        "ModelPruning",
        lambda _: _pruned(nm()),
        r"ModelPruning would both prune hidden.weight.*NMSparsity\(exclude=\['hidden.weight'\]\)",
        lambda _: _pruned(nm(include=["hidden", "encoder"], exclude=["hidden.weight"])),
    ),
    Row(
        "a variance that SGD lacks",
        lambda _: fit(nm(recipe="step"), module=odd.with_optimizer(odd.sgd)),
        r"^NMSparsity with recipe='step' freezes .* SGD keeps none. Set recipe='sr-ste', or train with",
        lambda _: fit(nm(recipe="sr-ste"), module=odd.with_optimizer(odd.sgd)),
    ),
    Row(
        "a masked straight-through",
        lambda _: fit(nm(recipe="sr-ste", gradient="masked")),
        r"Keep gradient='ste'",
        lambda _: fit(nm(recipe="sr-ste")),
    ),
    Row(
        "the end of what has none",
        lambda _: fit(nm(recipe="sr-ste", finetune_fraction=0.2)),
        r"Remove finetune_fraction",
        lambda _: fit(nm(recipe="sr-ste")),
    ),
    Row(
        "decay without one",
        lambda _: fit(nm(recipe="sr-ste", decay=0.1)),
        r"Remove decay",
        lambda _: fit(nm(recipe="sr-ste")),
    ),
    Row(
        "stages and phases",
        lambda _: fit(nm(recipe=STAGES, dense_fraction=0.1)),
        r"Remove dense_fraction and finetune_fraction",
        lambda _: fit(nm(recipe=STAGES)),
    ),
    Row(
        "stages that end elsewhere",
        lambda _: fit(nm(recipe=STAGES, pattern="1:4")),
        r"Set the last pattern of the schedule as pattern='2:4' too",
        lambda _: fit(nm(recipe=STAGES, pattern="2:4")),
    ),
    Row(
        "stages and patterns that are not equal",
        lambda _: fit(nm(recipe=STAGES, include=None, pattern={"hidden": "2:4", "encoder": "1:4"})),
        r"ends with 2:4 for all layers, but pattern is 2:4, 1:4. Set",
        lambda _: fit(nm(recipe=STAGES, include=None, pattern={"hidden": "2:4", "encoder": "2:4"})),
    ),
    Row("no pattern", lambda _: fit(nm(pattern={})), r"Write for example '2:4'", lambda _: fit(nm(pattern="2:4"))),
    Row(
        "an axis too many",
        lambda _: fit(nm(axis=3)),
        r"Set axis to 'input' or 'output'",
        lambda _: fit(nm(axis="output")),
    ),
    Row(
        "no room for a recipe",
        lambda _: fit(nm(dense_fraction=0.5, finetune_fraction=0.5)),
        r"their sum must be below 1",
        lambda _: fit(nm(dense_fraction=0.2, finetune_fraction=0.5)),
    ),
]


def _pruned(sparsity: Any) -> Fit:
    module = make_classifier()
    other = pl.callbacks.ModelPruning("l1_unstructured", parameters_to_prune=[(module.hidden, "weight")], amount=0.5)
    return fit(sparsity, other, module=module)


QUANTIZATION = [
    Row(
        "a symmetric bit",
        lambda _: fit(qat(1)),
        r"Use 2 bits \(-1, 0, 1\), or",
        lambda _: fit(qat(1, quantizer="statsq")),
    ),
    Row(
        "zeros on a grid without 0",
        lambda _: fit(nm(), qat(quantizer="quest")),
        r"cannot quantize hidden.weight with quantizer='quest'.*sparse \(2:4\).*Use quantizer='ste'",
        lambda _: fit(nm(), qat(quantizer="ste")),
    ),
    Row(
        "a step that moves weights",
        lambda _: fit(qat(), lg.SAM()),
        r"SAM moves them within a step.*without SAM",
        lambda _: fit(qat()),
    ),
    Row(
        "single weights of a basis",
        lambda _: fit(qat(quantizer="quest", annealing_start=0.5)),
        r"Set hadamard=False, or remove annealing_start",
        lambda _: fit(qat(quantizer="quest", annealing_start=0.5, hadamard=False)),
    ),
    Row(
        "one weight on two grids",
        lambda _: fit(qat(), qat(8, name="b")),
        r"both choose hidden.weight .*Separate them: set include=",
        lambda _: fit(qat(), qat(8, name="b", include=["head"])),
    ),
]
CLIPPING = [
    Row(
        "a Trainer that clips",
        lambda _: fit(lg.NormClipping(1.0), gradient_clip_val=1.0),
        r"^NormClipping and .* would both clip.*in the setup\(\) of a callback that comes before",
        lambda _: fit(odd.ClippingOff(), lg.NormClipping(1.0), gradient_clip_val=1.0),
    ),
    Row(
        "noise before a Trainer that clips",
        lambda _: fit(lg.GradientNoise(0.01), gradient_clip_val=1.0),
        r"Put NormClipping\(max_norm=1.0\) before it and set gradient_clip_val=None",
        lambda _: fit(lg.NormClipping(1.0), lg.GradientNoise(0.01)),
    ),
    Row(
        "the order",
        lambda _: fit(lg.NormClipping(1.0), lg.GradientCentralization()),
        r"Write callbacks=\[GradientCentralization \(center\), NormClipping \(clip\)\]",
        lambda _: fit(lg.GradientCentralization(), lg.NormClipping(1.0)),
    ),
    Row(
        "a moment that SGD lacks",
        lambda _: fit(lg.SpikeClipping(), module=odd.with_optimizer(odd.sgd)),
        r"^SpikeClipping reads .* SGD keeps none.*or clip with ZClip",
        lambda _: fit(lg.ZClip(), module=odd.with_optimizer(odd.sgd)),
    ),
    Row(
        "moments that SGD lacks",
        lambda _: fit(lg.MomentumReset(5), module=odd.with_optimizer(odd.sgd)),
        r"^MomentumReset sets .* SGD keeps none. Train with Adam",
        lambda _: fit(lg.MomentumReset(5), module=odd.with_optimizer(odd.adam)),
    ),
    Row(
        "two resets",
        lambda _: fit(lg.MomentumReset(5), lg.MomentumReset(7, name="b")),
        r"Use only one MomentumReset",
        lambda _: fit(lg.MomentumReset(5)),
    ),
    Row(
        "a warm-up too long",
        lambda _: fit(lg.MomentumReset(3, warmup_steps=3)),
        r"Omit it to use half of every_n_steps",
        lambda _: fit(lg.MomentumReset(3)),
    ),
    Row(
        "vectors only",
        lambda _: fit(lg.GradientCentralization(), module=odd.Tiny(odd.Scale())),
        r"^GradientCentralization .* vectors only. Drop the callback",
        lambda _: fit(module=odd.Tiny(odd.Scale())),
    ),
    Row(
        "no convolution",
        lambda _: fit(lg.GradientCentralization(conv_only=True)),
        r"Set conv_only=False",
        lambda _: fit(lg.GradientCentralization(conv_only=False)),
    ),
    Row(
        "one Linear",
        lambda _: fit(lg.AdaptiveGradientClipping(0.01), module=odd.one_linear()),
        r"^AdaptiveGradientClipping has nothing to act on besides net.1.*Set head=None",
        lambda _: fit(lg.AdaptiveGradientClipping(0.01, head=None), module=odd.one_linear()),
    ),
    Row(
        "no Linear",
        lambda _: fit(lg.AdaptiveGradientClipping(0.01), module=odd.Tiny(odd.Scale())),
        r"found no Linear. .*or set head=None",
        lambda _: fit(lg.AdaptiveGradientClipping(0.01, head=None), module=odd.Tiny(odd.Scale())),
    ),
    Row(
        "a head of another name",
        lambda _: fit(lg.AdaptiveGradientClipping(0.01, head="haed")),
        r"\(head=...\).*Did you mean 'head'",
        lambda _: fit(lg.AdaptiveGradientClipping(0.01, head="head")),
    ),
    Row(
        "included and excluded",
        lambda _: fit(lg.NormClipping(1.0, include=["hidden"], exclude=["hidden"])),
        r"^NormClipping has no parameter .* include=\['hidden'\] selects hidden.*excludes all of them\. Include .*'mix'",
        lambda _: fit(lg.NormClipping(1.0, include=["mix", "encoder"], exclude=["hidden"])),
    ),
    Row(
        "everything excluded",
        lambda _: fit(lg.ValueClipping(1.0, exclude=["*"])),
        r"exclude=\['\*'\] excludes all of mix.w.*Exclude less",
        lambda _: fit(lg.ValueClipping(1.0, exclude=["mix"])),
    ),
    Row(
        "a limit for nothing",
        lambda _: fit(lg.NormClipping({})),
        r"got an empty mapping. Add an entry, such as \{'\*': 1.0\}",
        lambda _: fit(lg.NormClipping({"*": 1.0})),
    ),
    Row(
        "nothing to watch",
        lambda _: fit(lg.GradientMonitor(include=["head"], exclude=["head"])),
        r"^GradientMonitor has no parameter to watch. include=.*excludes all of them.*exclude less",
        lambda _: fit(lg.GradientMonitor(include=["head"], exclude=["head.bias"])),
    ),
    Row(
        "nothing that moves",
        lambda _: fit(lg.GradientMonitor(include=["mix"]), module=odd.with_optimizer(lambda p: odd.sgd(p[-2:]))),
        r"No optimizer holds a selected parameter. Include some that one holds, such as 'head.weight'",
        lambda _: fit(
            lg.GradientMonitor(include=["head.weight"]), module=odd.with_optimizer(lambda p: odd.sgd(p[-2:]))
        ),
    ),
    Row(
        "no optimizer to watch",
        lambda _: fit(lg.GradientMonitor(), module=odd.with_optimizer(lambda _: None)),
        r"returns no optimizer with parameters. Return one",
        lambda _: fit(lg.GradientMonitor(), module=odd.with_optimizer(odd.sgd)),
    ),
    Row(
        "sparse gradients",
        lambda _: fit(lg.NormClipping(1.0), module=odd.words_module(sparse=True), train=odd.tokens(), validation=None),
        r"^NormClipping needs dense gradients.*exclude=\['net.words'\]",
        lambda _: fit(
            lg.NormClipping(1.0, exclude=["net.words"]),
            module=odd.words_module(sparse=True),
            train=odd.tokens(),
            validation=None,
        ),
    ),
    Row(
        "complex entries",
        lambda _: fit(lg.ValueClipping(1.0), module=odd.Tiny(odd.complex_net())),
        r"^ValueClipping cannot compare complex numbers.*exclude=\['net.1.scale'\]",
        lambda _: fit(lg.ValueClipping(1.0, exclude=["net.1.scale"]), module=odd.Tiny(odd.complex_net())),
    ),
    Row(
        "an optimizer that the Trainer does not know",
        lambda _: fit(lg.NormClipping(1.0), module=odd.OwnOptimizer(False)),
        r"^NormClipping does not know the SGD that made a step.*Return it from configure_optimizers",
        lambda _: fit(lg.NormClipping(1.0), module=odd.OwnOptimizer(True)),
    ),
    Row(
        "nan for ever",
        lambda _: fit(lg.SkipNonFinite(max_in_row=2), module=odd.nan_loss()),
        r"^SkipNonFinite: 2 steps in a row.*To continue anyway, set max_in_row=None",
        lambda _: fit(lg.SkipNonFinite(max_in_row=None), module=odd.nan_loss()),
    ),
]


METRICS = [
    Row(
        "no validation",
        lambda _: fit(lr(), validation=None),
        r"^AccuracyGradientLR observes 'val_acc' at validations, and this fit has none.*interval='epoch'",
        lambda _: fit(lr(interval="epoch", monitor="train_loss", mode="min"), validation=None),
    ),
    Row(
        "a metric with a letter too few",
        lambda _: fit(lr(monitor="val_ac")),
        r"'val_ac' is not logged.*Did you mean 'val_acc'",
        lambda _: fit(lr(monitor="val_acc")),
    ),
    Row(
        "a metric that is not there",
        lambda _: fit(lr(monitor="bleu")),
        r"Log it with self.log\('bleu', ...\), or set monitor to a metric that is logged",
        lambda _: fit(lr(monitor="val_loss", mode="min")),
    ),
    Row(
        "a metric of a callback",
        lambda _: fit(lr(monitor="adversarial/val_acc")),
        r"Add AdversarialEvaluation\(\) to it",
        lambda _: fit(evaluation(), lr(monitor="adversarial/val_acc")),
    ),
    Row(
        "an optimizer too many",
        lambda _: fit(lr(optimizers=[0, 1])),
        r"the module has 1; .* Remove 1",
        lambda _: fit(lr(optimizers=[0])),
    ),
    Row(
        "a group too many",
        lambda _: fit(lr(param_groups=[0, 5])),
        r"optimizer 0 has 1; .* Remove 5",
        lambda _: fit(lr(param_groups=[0])),
    ),
    Row(
        "no optimizer",
        lambda _: fit(lr(), module=odd.with_optimizer(lambda _: None)),
        r"returns no optimizer. Return one, or drop the callback",
        lambda _: fit(lr(), module=odd.with_optimizer(odd.sgd)),
    ),
]

ATTACKS = [
    Row(
        "manual optimization",
        lambda _: fit(attack(), module=odd.Manual()),
        r"^AdversarialTraining does not work with manual.*Train with automatic optimization, or measure with",
        lambda _: fit(evaluation(), module=odd.Manual()),
    ),
    Row(
        "steps of fgsm",
        lambda _: fit(attack(steps=3)),
        r"Use attack='pgd'",
        lambda _: fit(attack(steps=2, attack="pgd")),
    ),
    Row("two attacks", lambda _: fit(attack(), attack(name="b")), r"Use only one of them", lambda _: fit(attack())),
    Row(
        "a key that leads nowhere",
        lambda _: fit(attack(input_key="image")),
        r"^AdversarialTraining: input_key='image' is not in the batch.*Set input_key=0, or omit it",
        lambda _: fit(attack(input_key=0)),
    ),
    Row(
        "a key of the targets",
        lambda _: fit(attack(input_key=1)),
        r"names a tensor of torch.int64. Set input_key=0",
        lambda _: fit(attack(input_key=0)),
    ),
    Row(
        "an embedding that is not there",
        lambda _: fit(attack(input_key="embedding")),
        r"Classifier has none. Leave input_key at None",
        lambda _: fit(attack()),
    ),
    Row(
        "an embedding that is not called",
        lambda _: fit(attack(), module=odd.words_module(as_module=False), train=odd.tokens(), validation=None),
        r"the step calls none. Call the embedding as a module",
        lambda _: fit(attack(), module=odd.words_module(), train=odd.tokens(), validation=None),
    ),
    Row(
        "bytes",
        lambda _: fit(attack(), module=odd.Bytes(False), train=odd.pixels(), validation=None),
        r"Convert integer images to floats in the data set or in on_after_batch_transfer",
        lambda _: fit(attack(), module=odd.Bytes(True), train=odd.pixels(), validation=None),
    ),
    Row(
        "other bounds",
        lambda _: fit(attack(bounds=[0.0, 1.0])),
        r"Otherwise set bounds to their range",
        lambda _: fit(attack(bounds=[-9.0, 9.0])),
    ),
    Row(
        "channels",
        lambda _: fit(attack(mean=[0.0] * 3, std=[1.0] * 3)),
        r"for each of 4 channels.*Set mean to a list of 4 numbers, or to one",
        lambda _: fit(attack(mean=[0.0] * 4, std=[1.0] * 4)),
    ),
    Row(
        "half of a normalisation",
        lambda _: fit(attack(mean=0.5)),
        r"mean and std must be set together",
        lambda _: fit(attack(mean=0.5, std=1.0)),
    ),
    Row(
        "an input that is detached",
        lambda _: fit(attack(), module=odd.Detached(True)),
        r"compute the loss from the input with gradients, without detach\(\)",
        lambda _: fit(attack(), module=odd.Detached(False)),
    ),
    Row(
        "a step that changes weights",
        lambda _: fit(attack(), module=odd.Decaying(True)),
        r"^AdversarialTraining runs training_step .*changes the parameter 'net.1.weight'. Change it in on_train_batch_end",
        lambda _: fit(attack(), module=odd.Decaying(False)),
    ),
    Row(
        "restarts of one start",
        lambda _: fit(evaluation(restarts=2, random_start=False)),
        r"Set random_start=True",
        lambda _: fit(evaluation(restarts=2)),
    ),
    Row(
        "no validation_step",
        lambda _: fit(evaluation(), module=odd.Unvalidated()),
        r"^AdversarialEvaluation runs validation_step .* Write a validation_step",
        lambda _: fit(evaluation(), module=odd.Tiny()),
    ),
    Row(
        "no loss to raise",
        lambda _: fit(evaluation(), module=odd.Unseen(False)),
        r"^AdversarialEvaluation needs a loss to maximize.*or return it",
        lambda _: fit(evaluation(), module=odd.Unseen(True)),
    ),
]

LOADERS = [
    Row(
        "a stream",
        lambda _: fit(pruning(), train=odd.loader(odd.Stream())),
        r"^DataPruning selects samples by index, but .*Stream have none.*Use a data set with __len__ and __getitem__",
        lambda _: fit(pruning(), train=odd.loader(make_data())),
    ),
    Row(
        "no DataLoader",
        lambda _: fit(lg.InfoBatch(), train=odd.Feed()),
        r"^InfoBatch needs a torch DataLoader.*got Feed. Return torch.utils.data.DataLoader",
        lambda _: fit(lg.InfoBatch(), train=odd.loader()),
    ),
    Row(
        "batches of unknown size",
        lambda _: fit(pruning(), train=DataLoader(make_data(), batch_sampler=odd.Counted())),
        r"^DataPruning needs the number of samples in a batch, but Counted has no batch_size. Give it an attribute batch_size",
        lambda _: fit(pruning(), train=DataLoader(make_data(), batch_sampler=odd.Sized())),
    ),
    Row(
        "batches of unknown number",
        lambda _: fit(pruning(), train=DataLoader(make_data(), batch_sampler=odd.Uncounted()), limit_train_batches=4),
        r"^DataPruning needs the number of batches in an epoch, but Uncounted has no __len__. Give it",
        lambda _: fit(pruning(), train=DataLoader(make_data(), batch_sampler=odd.Sized()), limit_train_batches=4),
    ),
    Row(
        "no batches",
        lambda _: fit(lg.RepeatedRandomSubset(0.3), train=odd.loader(batch_size=None)),
        r"^RepeatedRandomSubset needs batches of indices.*use a BatchSampler as its sampler",
        lambda _: fit(
            lg.RepeatedRandomSubset(0.3),
            train=DataLoader(
                odd.Lists(), batch_size=None, sampler=BatchSampler(SequentialSampler(make_data()), BATCH, False)
            ),
        ),
    ),
    Row(
        "no order",
        lambda _: fit(pruning(), train=odd.loader(in_order=False)),
        r"Set in_order=True",
        lambda _: fit(pruning(), train=odd.loader()),
    ),
    Row(
        "names for indices",
        lambda _: fit(pruning(), train=odd.loader(odd.Named(False), sampler=odd.Keys(odd.Named(False).names))),
        r"^DataPruning identifies samples by index.*Keys yields 's0'. Let the sampler yield integers",
        lambda _: fit(pruning(), train=odd.loader(odd.Named(True), sampler=odd.Keys(range(48)))),
    ),
    Row(
        "two that choose",
        lambda _: fit(pruning(), lg.InfoBatch()),
        r"^DataPruning and InfoBatch would both choose.*Keep one",
        lambda _: fit(lg.InfoBatch()),
    ),
    Row(
        "which of two loaders",
        lambda _: fit(lg.RepeatedRandomSubset(0.3), module=odd.Two(), train=both()),
        r"^RepeatedRandomSubset must know which.*Set loader_key to one of 'a', 'b'",
        lambda _: fit(lg.RepeatedRandomSubset(0.3, loader_key="a"), module=odd.Two(), train=both()),
    ),
    Row(
        "a loader that is not there",
        lambda _: fit(lg.RepeatedRandomSubset(0.3, loader_key="c"), module=odd.Two(), train=both()),
        r"^RepeatedRandomSubset: loader_key must be one of 'a', 'b'.*got 'c'",
        lambda _: fit(lg.RepeatedRandomSubset(0.3, loader_key="b"), module=odd.Two(), train=both()),
    ),
    Row(
        "a key of one loader",
        lambda _: fit(pruning(loader_key="train")),
        r"loader_key='train' matches nothing: the only training loader has no key. Remove it",
        lambda _: fit(pruning()),
    ),
    Row(
        "a step of several loaders",
        lambda _: fit(pruning(loader_key="a"), module=odd.Two(), train=both()),
        r"^DataPruning cannot run training_step.*set score_fn= to a function",
        lambda _: fit(pruning(loader_key="a", score_fn=norms), module=odd.Two(), train=both()),
    ),
    Row(
        "an epoch that never comes",
        lambda _: fit(pruning(epoch=10)),
        r"Set epoch to a smaller number",
        lambda _: fit(pruning(epoch=1)),
    ),
    Row(
        "less than a batch",
        lambda _: fit(lg.RepeatedRandomSubset(0.9), train=odd.loader(drop_last=True)),
        r"^RepeatedRandomSubset keeps .*Prune less, or use smaller batches",
        lambda _: fit(lg.RepeatedRandomSubset(0.5), train=odd.loader(drop_last=True)),
    ),
]

LOSSES = [
    Row(
        "a loss that is not seen",
        lambda _: fit(pruning(), module=odd.HandWritten()),
        r"^DataPruning must capture the loss of each sample. No loss .*set score_fn= to a function",
        lambda _: fit(pruning(score_fn=norms), module=odd.HandWritten()),
    ),
    Row(
        "a loss that mixes samples",
        lambda _: fit(lg.InfoBatch(), module=odd.RootMean()),
        r"^sqrt \(odd_projects.py:\d+\) mixes .*InfoBatch needs the loss.*use RepeatedRandomSubset, which needs no loss",
        lambda _: fit(lg.RepeatedRandomSubset(0.3), module=odd.RootMean()),
    ),
    Row(
        "a part of a loss",
        lambda _: fit(lg.LossReweighting(), module=odd.Spread()),
        r"^std \(odd_projects.py:\d+\) mixes .*LossReweighting needs the loss.*Set loss_index=0 to use cross_entropy alone",
        lambda _: fit(lg.LossReweighting(loss_index=0), module=odd.Spread()),
    ),
    Row(
        "two classifications for a score",
        lambda _: fit(pruning(), module=odd.Sharpened()),
        r"^DataPruning .*loss_index=0",
        lambda _: fit(pruning(loss_index=0), module=odd.Sharpened()),
    ),
    Row(
        "chunks",
        lambda _: fit(pruning(), module=odd.Chunked(4)),
        r"^DataPruning must capture the loss of each sample. .*or chunks of a loss.*compute chunks in one call",
        lambda _: fit(pruning(), module=odd.Chunked(1)),
    ),
    Row(
        "chunks for UniformLearning",
        lambda _: fit(lg.UniformLearning(1), module=odd.Chunked(4)),
        r"^UniformLearning must capture the loss of each sample. .*or chunks of a loss.*compute chunks in one call",
        lambda _: fit(lg.UniformLearning(1), module=odd.Chunked(1)),
    ),
    Row(
        "regression for UniformLearning",
        lambda _: fit(lg.UniformLearning(1), module=odd.Tiny(target="number")),
        r"^UniformLearning needs logits .*use DataPruning\(score='loss'\)",
        lambda _: fit(pruning(score="loss"), module=odd.Tiny(target="number")),
    ),
    Row(
        "margins of a regression",
        lambda _: fit(pruning(score="margin"), module=odd.Tiny(target="number")),
        r"^DataPruning: .* needs .*Choose another score",
        lambda _: fit(pruning(score="loss"), module=odd.Tiny(target="number")),
    ),
    Row(
        "logits without a Linear",
        lambda _: fit(pruning(score="grand-last"), module=odd.Tiny(odd.Scale())),
        r"^DataPruning needs the features of the last layer.*Use another score",
        lambda _: fit(pruning(score="el2n"), module=odd.Tiny(odd.Scale())),
    ),
    Row(
        "the variance of a regression",
        lambda _: fit(pruning(score="vog", epoch=2), module=odd.Tiny(target="number"), max_epochs=3),
        r"^DataPruning\(score='vog'\) needs cross_entropy.*Use another score",
        lambda _: fit(pruning(score="grand", epoch=2), module=odd.Tiny(target="number"), max_epochs=3),
    ),
    Row(
        "one score for a batch",
        lambda _: fit(pruning(score_fn=scalar)),
        r"^DataPruning: score_fn must return one score for each of the 8 samples.*all dimensions except the first",
        lambda _: fit(pruning(score_fn=norms)),
    ),
    Row(
        "classes that are not known",
        lambda _: fit(pruning(score="loss", balance="class"), module=odd.Tiny(target="number")),
        r"^DataPruning balances classes.*Leave balance at None",
        lambda _: fit(pruning(score="loss"), module=odd.Tiny(target="number")),
    ),
    Row(
        "a step of its own for UniformLearning",
        lambda _: fit(lg.UniformLearning(1), module=odd.Manual()),
        r"^UniformLearning does not work with manual optimization.*DataPruning\(score='aum'\)",
        lambda _: fit(pruning(score="aum"), module=odd.Manual()),
    ),
    Row(
        "a step of its own for InfoBatch",
        lambda _: fit(lg.InfoBatch(), module=odd.Manual()),
        r"^InfoBatch does not work with manual optimization.*RepeatedRandomSubset",
        lambda _: fit(lg.RepeatedRandomSubset(0.3), module=odd.Manual()),
    ),
    Row(
        "two that weight",
        lambda _: fit(lg.InfoBatch(), lg.LossReweighting()),
        r"would both weight the samples of a batch. Keep one",
        lambda _: fit(lg.LossReweighting()),
    ),
    Row(
        "a step that changes weights before a score",
        lambda _: fit(pruning(), module=odd.Decaying(True)),
        r"^DataPruning runs training_step .*Change it in on_train_batch_end",
        lambda _: fit(pruning(), module=odd.Decaying(False)),
    ),
]

SCORES = [
    Row(
        "two scores",
        lambda _: fit(pruning(score="loss", score_fn=norms)),
        r"Set only one of them",
        lambda _: fit(pruning(score_fn=norms)),
    ),
    Row(
        "ccs of the easy",
        lambda _: fit(pruning(select="ccs", keep="easy")),
        r"Leave keep at 'hard'",
        lambda _: fit(pruning(select="ccs")),
    ),
    Row(
        "a floor in strata",
        lambda _: fit(pruning(select="ccs", class_floor=0.2)),
        r"Set class_floor to 0",
        lambda _: fit(pruning(select="ccs")),
    ),
    Row(
        "a floor as high as the rest",
        lambda _: fit(pruning(0.5, class_floor=0.5)),
        r"Use balance='class'",
        lambda _: fit(pruning(0.5, balance="class")),
    ),
    Row(
        "an offset of no score",
        lambda _: fit(pruning(keep="random", offset=0.1)),
        r"Leave offset at 0",
        lambda _: fit(pruning(keep="random")),
    ),
    Row(
        "rounds",
        lambda _: fit(pruning([0.1], epoch=[1, 2])),
        r"Write for example epoch=\[5, 10\], prune=\[0.2, 0.5\]",
        lambda _: fit(pruning([0.1, 0.3], epoch=[1, 2]), max_epochs=3),
    ),
    Row(
        "passes at one epoch",
        lambda _: fit(pruning(score="vog", epoch=1)),
        r"Set epoch to at least 2",
        lambda _: fit(pruning(score="vog", epoch=2), max_epochs=3),
    ),
    Row(
        "no score file",
        lambda at: fit(pruning(score_files=[str(at / "s.npz")])),
        r"^DataPruning finds no score file.*write the file first with save_scores",
        lambda at: fit(pruning(score_files=[scores_of(at / "s.npz")])),
    ),
    Row(
        "no such kind of scores",
        lambda at: fit(pruning(score_files=[scores_of(at / "a.npz"), scores_of(at / "b.npz", score="loss")])),
        r"got 'el2n' and 'loss'. Pass files of one score",
        lambda at: fit(pruning(score_files=[str(at / "a.npz")])),
    ),
    Row(
        "scores of other data",
        lambda at: fit(pruning(score_files=[other_scores(at / "s.npz")])),
        r"Score this data set, or use strict=False",
        lambda at: fit(pruning(score_files=[str(at / "s.npz")], strict=False)),
    ),
    Row(
        "scores into a folder",
        lambda at: fit(pruning(save_scores=f"{at}/")),
        r"Name a .npz file",
        lambda at: fit(pruning(save_scores=f"{at}/s.npz")),
    ),
]

ROWS = [*SPARSITY, *QUANTIZATION, *CLIPPING, *METRICS, *ATTACKS, *LOADERS, *LOSSES, *SCORES]


def follow(row: Row, folder: Path) -> None:
    """See that a fit is refused in these words, and that the fit of a user who follows them runs."""
    with pytest.raises(REFUSALS) as refused:
        row.has(folder).run()
    message = str(refused.value)
    assert re.search(row.words, message), message
    row.changed(folder).run()


@pytest.mark.filterwarnings(
    "ignore:You passed in a .val_dataloader. but have no .validation_step",
    "ignore:.*configure_optimizers. returned .None.",
    "ignore:SkipNonFinite skips a step",
    "ignore:The scores in .* belong to another data set",
    "ignore:AccuracyGradientLR never received a finite value",
    "ignore:.*Your .IterableDataset. has .__len__. defined",
)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_following_a_refusal_gives_a_run(row: Row, tmp_path: Path) -> None:
    follow(row, tmp_path)


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in [*ROWS, *STRATEGIES]}) == len([*ROWS, *STRATEGIES]) >= 50


def dgc(**changes: Any) -> Any:
    return DGCStrategy(**{"ratio": 0.1, "min_numel": 1, "start_method": "popen", **changes})


def power(**changes: Any) -> Any:
    return PowerSGDStrategy(**{"rank": 1, "min_numel": 1, **changes})


def momentum() -> Any:
    return make_classifier(optimizer="sgd")


def two_optimizers() -> Any:
    return make_classifier(optimizer="sgd", manual=True)


def halves(parameters: Any) -> Any:
    return [odd.sgd(parameters[:4]), odd.sgd(parameters[4:])]


STRATEGIES = [
    Row(
        "DGC and a Trainer that clips",
        lambda _: fit(module=momentum(), strategy=dgc(), gradient_clip_val=1.0),
        r"Set gradient_clip_val=None and DGCStrategy\(local_clip=1.0\).*in the setup\(\) of a callback",
        lambda _: fit(odd.ClippingOff(), module=momentum(), strategy=dgc(local_clip=1.0), gradient_clip_val=1.0),
    ),
    Row(
        "DGC and a callback that clips",
        lambda _: fit(lg.NormClipping(1.0), module=momentum(), strategy=dgc()),
        r"^NormClipping would clip what DGCStrategy.*DGCStrategy\(local_clip=...\)",
        lambda _: fit(module=momentum(), strategy=dgc(local_clip=1.0)),
    ),
    Row(
        "DGC and the momentum of Adam",
        lambda _: fit(module=make_classifier(), strategy=dgc(correction="momentum")),
        r"Set correction='error_feedback'",
        lambda _: fit(module=make_classifier(), strategy=dgc(correction="error_feedback")),
    ),
    Row(
        "a name that DGC does not find",
        lambda _: fit(module=momentum(), strategy=dgc(exclude=["haed"])),
        r"^DGCStrategy\(exclude=...\).*Did you mean 'head'",
        lambda _: fit(module=momentum(), strategy=dgc(exclude=["head"])),
    ),
    Row(
        "a ratio of no layer",
        lambda _: fit(module=momentum(), strategy=dgc(layer_ratios={"haed": 0.5})),
        r"^DGCStrategy\(layer_ratios=...\).*Did you mean 'head'",
        lambda _: fit(module=momentum(), strategy=dgc(layer_ratios={"head": 0.5})),
    ),
    Row(
        "manual optimization under PowerSGD",
        lambda _: fit(module=two_optimizers(), strategy=power()),
        r"^PowerSGDStrategy does not work with manual optimization.*or automatic optimization",
        lambda _: fit(module=momentum(), strategy=power()),
    ),
    Row(
        "sparse gradients under PowerSGD",
        lambda _: fit(module=odd.words_module(sparse=True), train=odd.tokens(), validation=None, strategy=power()),
        r"^PowerSGDStrategy needs dense gradients.*Build it with sparse=False",
        lambda _: fit(module=odd.words_module(sparse=False), train=odd.tokens(), validation=None, strategy=power()),
    ),
    Row(
        "complex gradients under PowerSGD",
        lambda _: fit(module=odd.Tiny(odd.complex_net()), strategy=power()),
        r"^PowerSGDStrategy compresses only real gradients.*Use strategy='ddp'",
        lambda _: fit(module=odd.Tiny(odd.complex_net()), strategy="ddp"),
    ),
]


@pytest.mark.parametrize("row", STRATEGIES, ids=str)
def test_following_a_refusal_of_a_strategy_gives_a_run(row: Row, tmp_path: Path) -> None:
    if "complex" in row.name and TORCH < (2, 13):
        pytest.skip("with torch 2.6 gloo cannot send complex parameters; the release that can is not known")
    on_ranks(1, follow, row, tmp_path)
