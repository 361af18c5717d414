"""Which parameters form a layer."""

from typing import Any

import torch
from torch import nn

from lightning_grad.utilities.module_layers import layers_of


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        if experts:
            self.experts = nn.ModuleList([Block() for _ in range(experts)])


class Transformer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([Block(**options) for _ in range(3)])
        self.norm = nn.LayerNorm(4)


class Whole(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


def layers(module: nn.Module, patterns: Any = None) -> list[str]:
    return list(dict.fromkeys(layers_of(module, patterns).values()))


STACK = ["embed", "blocks.0", "blocks.1", "blocks.2"]


def test_blocks_of_a_stack_are_layers_and_so_is_what_stands_around_them() -> None:
    assert layers(Whole(net=Transformer(), head=nn.Linear(4, 2))) == ["net", *(f"net.{each}" for each in STACK), "head"]
    assert layers_of(Whole(net=Transformer()))["net.token"] == "net"
    assert layers(Transformer()) == ["root", *STACK]


def test_experts_in_a_block_do_not_divide_it() -> None:
    assert layers(Transformer(experts=2)) == ["root", *STACK]


def test_containers_are_opened_and_other_modules_are_one_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), Plain())
    assert layers(Whole(net=net)) == ["net.0", "net.2.0", "net.3"]
    assert layers(Whole(body=Plain(), head=nn.Linear(4, 2))) == ["body", "head"]


def test_a_norm_belongs_to_the_layer_before_it_unless_it_is_named_or_first() -> None:
    """So the last block has the factor after the head's, as in BEiT, and not the one after that."""
    net = Whole(net=Transformer(), head=nn.Linear(4, 2))
    assert layers_of(net)["net.norm.weight"] == "net.blocks.2"
    assert layers_of(net, ["net.norm"])["net.norm.weight"] == "net.norm"
    assert layers_of(net, ["net.blocks"])["net.norm.weight"] == "net.blocks"
    stem = Whole(stem=nn.BatchNorm1d(4), first=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), act=nn.PReLU(), last=Plain())
    assert layers(stem) == ["stem", "first", "last"]
    assert layers(Whole(lazy=nn.LazyLinear(4), last=nn.LazyLinear(2))) == ["lazy", "last"]


def test_a_module_that_is_all_there_is_is_opened() -> None:
    assert layers(Whole(net=Whole(body=Plain()))) == ["net.body.first", "net.body.second"]


def test_patterns_name_layers_and_the_outermost_match_counts() -> None:
    net = Whole(net=Transformer(), head=nn.Linear(4, 2))
    assert layers(net, ["net.blocks"]) == ["net", "net.embed", "net.blocks", "head"]
    assert layers(net, ["net.blocks.*"]) == layers(net)
    assert layers(net, ["net"]) == ["net", "head"]
    assert layers(net, ["*.mix"])[2:5] == ["net.blocks.0", "net.blocks.0.mix", "net.blocks.1"]
    assert layers_of(net, ["net.token"])["net.token"] == "net.token"


def test_compiled_modules_have_the_names_and_layers_of_plain_ones() -> None:
    net = Whole(net=Transformer(), head=nn.Linear(4, 2))
    plain = layers_of(net)
    net.net = torch.compile(net.net, backend="eager")
    assert layers_of(net) == plain


def test_a_tied_parameter_has_a_layer_for_each_of_its_names() -> None:
    net = Whole(embed=nn.Embedding(5, 4), head=nn.Linear(4, 5, bias=False))
    net.head.weight = net.embed.weight
    assert layers_of(net) == {"embed.weight": "embed", "head.weight": "head"}
