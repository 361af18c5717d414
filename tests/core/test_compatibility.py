"""What a technique declares is what it refuses, in words that say what to do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typing_extensions import override

from lightning_grad.core import ELEMENTWISE, WHOLE_WEIGHTS, Compatibility, GradCallback, GradientConditioner, no, yes
from lightning_grad.core.compatibility import TITLES
from lightning_grad.testing import fit
from lightning_grad.utilities.checks import lacking

SCALER = torch.amp.GradScaler("cpu", init_scale=1024.0)
NOTHING = no("meets {}", "Take {value} away")
RULE = GradientConditioner.compatibility


class DDPStrategy:
    """Stands in for Lightning's."""


class FSDPStrategy:
    """Stands in for Lightning's."""


class OwnFSDP(FSDPStrategy):
    """A strategy derived from one that shards."""


class DeepSpeedStrategy(DDPStrategy):
    """Stands in for Lightning's, which derives from DDP too."""


class OwnDeepSpeed(DeepSpeedStrategy):
    """A strategy derived from one that shards."""


class ModelParallelStrategy:
    """Stands in for Lightning's."""


STRATEGIES = {
    "ddp": (DDPStrategy,),
    "fsdp1": (FSDPStrategy, OwnFSDP),
    "deepspeed": (DeepSpeedStrategy, OwnDeepSpeed),
    "fsdp2": (ModelParallelStrategy,),
}
PAIRS = [(field, strategy) for field, strategies in STRATEGIES.items() for strategy in strategies]


def trainer_with(**attributes: Any) -> Any:
    plain = {
        "strategy": object(),
        "precision_plugin": SimpleNamespace(scaler=None),
        "precision": "32-true",
        "accumulate_grad_batches": 1,
        "callbacks": [],
        "gradient_clip_val": None,
        "gradient_clip_algorithm": None,
    }
    return SimpleNamespace(**{**plain, **attributes})


def module_with(automatic: bool = True) -> Any:
    module = nn.Sequential(nn.Linear(2, 2))
    module.automatic_optimization = automatic
    return module


def refuse(answers: Compatibility, trainer: Any = None, module: Any = None) -> None:
    answers.refuse("Rounding[x]", trainer or trainer_with(), module or module_with())


def only(field: str) -> Compatibility:
    """Return the answers of what works with everything else."""
    return Compatibility(**{**dict.fromkeys(TITLES, yes()), field: NOTHING})


def all_but(field: str) -> Compatibility:
    """Return the answers of what works with nothing else."""
    return Compatibility(**{**dict.fromkeys(TITLES, NOTHING), field: yes()})


# What is found in a run.


def test_every_field_has_a_title() -> None:
    assert list(Compatibility().answers) == list(TITLES)


def test_nothing_is_refused_of_an_ordinary_run() -> None:
    refuse(Compatibility(**dict.fromkeys(TITLES, NOTHING)))


class WeightAveraging:
    """Stands in for Lightning's."""


class EMAWeightAveraging(WeightAveraging):
    """Stands in for Lightning's."""


class Compressing:
    """A strategy whose gradients come late."""

    gradient_is_compressed = True


def in_other_namespace() -> Any:
    kind = type("Trainer", (SimpleNamespace,), {"__module__": "pytorch_lightning.trainer.trainer"})
    return kind(**vars(trainer_with()))


RUNS: dict[str, tuple[Any, Any, str]] = {
    "accumulation": (trainer_with(accumulate_grad_batches=3), None, "meets Trainer(accumulate_grad_batches=3)."),
    "bf16": (trainer_with(precision="bf16-true"), None, "meets precision='bf16-true'."),
    "fp16": (
        trainer_with(precision_plugin=SimpleNamespace(scaler=SCALER)),
        None,
        "meets an fp16 GradScaler.",
    ),
    "manual_optimization": (None, module_with(automatic=False), "meets manual optimization."),
    "weight_averaging": (trainer_with(callbacks=[EMAWeightAveraging()]), None, "meets weight averaging."),
    "pytorch_lightning": (in_other_namespace(), None, "meets pytorch_lightning.Trainer."),
    "gradient_clip_val": (trainer_with(gradient_clip_val=0.5), None, "meets Trainer(gradient_clip_val=0.5). Take 0.5"),
    "late_gradients": (trainer_with(strategy=Compressing()), None, "meets Compressing."),
}


@pytest.mark.parametrize("field", RUNS)
def test_what_a_run_has_is_refused_and_nothing_else(field: str) -> None:
    trainer, module, said = RUNS[field]
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole text is compared)
        refuse(only(field), trainer, module)
    assert str(error.value).startswith(f"Rounding[x] {said}")
    refuse(all_but(field), trainer, module)


def test_a_value_that_clips_otherwise_is_not_repeated() -> None:
    trainer = trainer_with(gradient_clip_val=0.5, gradient_clip_algorithm="value")
    with pytest.raises(ValueError, match=r"Take \.\.\. away"):
        refuse(only("gradient_clip_val"), trainer)


@pytest.mark.parametrize("how", ["module.compile()", "torch.compile(module)"])
def test_compiled_submodules_are_found(how: str) -> None:
    module = module_with()
    if how == "module.compile()":
        module[0].compile(backend="eager")
    else:
        module[0] = torch.compile(module[0], backend="eager")
    with pytest.raises(ValueError, match="meets compiled modules"):
        refuse(only("compiled"), module=module)
    refuse(all_but("compiled"), module=module)


# Strategies that shard.


@pytest.mark.parametrize(("field", "strategy"), PAIRS)
def test_a_strategy_is_one_of_them(field: str, strategy: type) -> None:
    with pytest.raises(ValueError, match=rf"meets {TITLES[field]} \({strategy.__name__}\)"):
        refuse(only(field), trainer_with(strategy=strategy()))
    refuse(all_but(field), trainer_with(strategy=strategy()))


@pytest.mark.parametrize(("field", "strategy"), [pair for pair in PAIRS if pair[0] != "ddp"])
def test_who_needs_whole_weights_says_so(field: str, strategy: type) -> None:
    said = rf"needs whole weights, and {TITLES[field]} \({strategy.__name__}\) shards them.*strategy='ddp'"
    with pytest.raises(ValueError, match=said):
        refuse(Compatibility(**WHOLE_WEIGHTS), trainer_with(strategy=strategy()))


@pytest.mark.parametrize("strategy", STRATEGIES["deepspeed"])
def test_a_rule_refuses_deepspeed(strategy: type) -> None:
    said = rf"works on gradients, and under DeepSpeed \({strategy.__name__}\) the engine owns them.*strategy='ddp'"
    with pytest.raises(ValueError, match=said):
        refuse(RULE, trainer_with(strategy=strategy()))


@pytest.mark.parametrize("strategy", STRATEGIES["fsdp1"])
def test_a_rule_refuses_flat_shards_unless_it_acts_on_entries(strategy: type) -> None:
    said = rf"needs gradients in their original shapes, and under FSDP1 \({strategy.__name__}\).*ModelParallelStrategy"
    with pytest.raises(ValueError, match=said):
        refuse(RULE, trainer_with(strategy=strategy()))
    refuse(ELEMENTWISE, trainer_with(strategy=strategy()))


@pytest.mark.parametrize("strategy", [DDPStrategy, ModelParallelStrategy])
def test_a_rule_takes_every_other_strategy(strategy: type) -> None:
    refuse(RULE, trainer_with(strategy=strategy()))


# Optimizers.


def optimizer_with(fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=fused)


def test_fused_optimizer_beside_a_grad_scaler_is_refused() -> None:
    trainer = trainer_with(precision_plugin=SimpleNamespace(scaler=SCALER))
    with pytest.raises(ValueError, match=r"fused AdamW leaves them multiplied.*fused=False, or precision='bf16-mixed'"):
        RULE.refuse_optimizer("NMSparsity", trainer, optimizer_with(fused=True))


@pytest.mark.parametrize(("fused", "scaler"), [(True, None), (False, SCALER)])
def test_fused_optimizer_or_grad_scaler_alone_passes(fused: bool, scaler: Any) -> None:
    trainer = trainer_with(precision_plugin=SimpleNamespace(scaler=scaler))
    RULE.refuse_optimizer("NMSparsity", trainer, optimizer_with(fused))


def test_precision_without_a_scaler_attribute_passes() -> None:
    RULE.refuse_optimizer("NMSparsity", SimpleNamespace(precision_plugin=object()), optimizer_with(fused=True))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "SGD"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: torch.optim.Adagrad(p), "Adagrad"),
    ],
)
def test_an_optimizer_that_keeps_no_second_moment_is_named(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Reader\[x\] meets {name}\."):
        only("no_second_moment").refuse_optimizer("Reader[x]", trainer_with(), make(nn.Linear(2, 2).parameters()))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_optimizers_that_keep_it_pass_before_and_after_a_step(kind: type) -> None:
    layer = nn.Linear(2, 2)
    optimizer = kind(layer.parameters())
    assert not lacking(optimizer, "exp_avg_sq")
    assert not optimizer.state, "the optimizer itself is not stepped"
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    only("no_second_moment").refuse_optimizer("Reader[x]", trainer_with(), optimizer)


def test_an_optimizer_that_cannot_be_built_anew_passes() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, parameters: Any, secret: str) -> None:
            super().__init__(parameters, lr=0.1)

    assert not lacking(Odd(nn.Linear(2, 2).parameters(), "s"), "exp_avg_sq")


def test_asking_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    assert not lacking(torch.optim.Adam(nn.Linear(2, 2, device="meta").parameters()), "exp_avg_sq")
    assert torch.equal(torch.get_rng_state(), state)


# Parameters.


def ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_embedding_is_refused_by_its_name(kind: type) -> None:
    net = nn.ModuleDict({"words": kind(4, 2, sparse=True), "head": nn.Linear(2, 2)})
    said = rf"Rule needs dense gradients, and {kind.__name__} 'words' creates sparse ones.*exclude=\['words'\]"
    for chosen in (ids(net), None):
        with pytest.raises(ValueError, match=said):
            RULE.refuse_parameters("Rule", net, chosen)


def test_sparse_embedding_that_is_not_chosen_passes() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(4, 2, sparse=True), "head": nn.Linear(2, 2)})
    RULE.refuse_parameters("Rule", net, ids(net["head"]))


def test_dense_embedding_and_other_modules_called_sparse_pass() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(4, 2), "own": nn.Linear(2, 2)})
    net["own"].sparse = "by 2:4"  # somebody's own attribute, which says nothing of gradients
    RULE.refuse_parameters("Rule", net, ids(net))


def test_complex_parameters_are_refused_by_what_compares_entries() -> None:
    net = nn.ParameterDict({"scale": torch.zeros(2, dtype=torch.complex64), "shift": torch.zeros(2)})
    with pytest.raises(
        ValueError, match=r"cannot compare complex numbers, and 'scale' holds them.*exclude=\['scale'\]"
    ):
        ELEMENTWISE.refuse_parameters("ValueClipping", net)
    ELEMENTWISE.refuse_parameters("ValueClipping", net, {id(net["shift"])})
    RULE.refuse_parameters("NormClipping", net)


# What is shown.


def test_a_refusal_is_explained_in_whole_sentences() -> None:
    assert RULE.sparse_gradients.explained("it") == (
        "It needs dense gradients, and it creates sparse ones. Build it with sparse=False, or exclude it: exclude=[...]."
    )
    assert yes("In a list.").explained("lists") == "In a list."


def test_a_refusal_may_be_of_one_setting() -> None:
    error = NOTHING.given("mode='all'").error("Rounding", "FSDP1", "it")
    assert str(error) == "Rounding with mode='all' meets FSDP1. Take it away."


def test_the_phase_of_a_rule_adds_what_it_does_not_work_with() -> None:
    class Clips(GradientConditioner):
        role = "clip"
        compatibility = ELEMENTWISE

    assert Clips.compatibility.gradient_clip_val.is_no
    assert Clips.compatibility.late_gradients.is_no
    assert not Clips.compatibility.fsdp1.is_no
    assert not ELEMENTWISE.gradient_clip_val.is_no


# A class of an author outside the package.


class Halving(GradCallback):
    """Works with accumulation only where it is told to wait."""

    namespace = "halving"
    compatibility = GradCallback.compatibility.but(
        accumulation=no("halves each batch, and {} adds {{several}} up", "Set accumulate_grad_batches=1, or wait=True")
    )

    def __init__(self, wait: bool = False, name: str | None = None) -> None:
        super().__init__(name)
        self.wait = wait

    @override
    def works_with(self) -> Compatibility:
        return self.compatibility.but(accumulation=yes()) if self.wait else self.compatibility


def test_an_author_outside_declares_the_same_way() -> None:
    fit([Halving()], max_epochs=1)
    fit([Halving(wait=True)], max_epochs=1, accumulate_grad_batches=3)
    said = r"^Halving\[x\] halves each batch, and Trainer\(accumulate_grad_batches=3\) adds {several} up. Set accumulate_grad"
    with pytest.raises(ValueError, match=said):
        fit([Halving(name="x")], max_epochs=1, accumulate_grad_batches=3)
