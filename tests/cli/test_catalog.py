"""``lightning-grad list`` and ``show``: every technique, as its class describes it."""

import importlib
import inspect
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_grad import callbacks, strategies
from lightning_grad.cli import main
from lightning_grad.cli.catalog import arguments_of, technique_named, techniques, yaml_example
from lightning_grad.cli.show import as_python
from lightning_grad.utilities.arguments import plain
from tests.cases import cases

NAMES = [technique.__name__ for members in techniques().values() for technique in members]
ROOT = Path(__file__).parents[2]
CATALOG = json.loads((ROOT / "docs/techniques.json").read_text())["techniques"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_list_has_a_line_for_every_technique_under_its_family(capsys: pytest.CaptureFixture[str]) -> None:
    families = printed(capsys, "list").split("\n\n")
    found = {}
    for block in families[:-1]:
        family, *lines = block.splitlines()
        found |= {name: (family, text) for name, text in (line.split(maxsplit=1) for line in lines)}
    assert {*found} == {*callbacks.__all__, *strategies.__all__} - {"CompressedDDPStrategy"}
    for entry in CATALOG:
        family, text = found[entry["name"]]
        assert family == entry["family"]
        assert text == entry["description"].replace("`", "")


def test_show_prints_arguments_defaults_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "show", "ZClip")
    assert text.startswith("ZClip (clipping): Clip gradients whose norm is an outlier among recent norms.\n")
    assert "  max_norm: float | Mapping[str, float] | None = None\n      Limit on the norm of every step, well" in text
    words = " ".join(text.split())
    assert "Raises: a fused optimizer with GradScaler, FSDP1," in words
    assert "- gradient_clip_val: It and gradient_clip_val would both clip. Keep one: drop the callback, or" in words
    assert text.endswith("\n  trainer = Trainer(callbacks=[ZClip(z_threshold=2.5)])\n")


@cases("name", NAMES)
def test_every_page_has_all_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "show", name)
    for argument in inspect.signature(technique_named(name)).parameters:
        assert re.search(rf"^  {argument}: .+\n      \S", text, re.MULTILINE), argument
    assert not re.search(r"``|:\w+:`", text)
    assert text.count(
        f"class_path: lightning_grad.{'strategies' if name in strategies.__all__ else 'callbacks'}.{name}\n"
    )


@cases("name", NAMES)
def test_python_and_yaml_of_a_page_are_the_same_run(name: str) -> None:
    example = yaml_example(technique_named(name))

    def trainer(**arguments: Any) -> dict[str, Any]:
        return arguments

    code = as_python(example).replace("from lightning.pytorch import Trainer\n", "")
    namespace: dict[str, Any] = {"Trainer": trainer}
    exec(code, namespace)
    built = namespace["trainer"]
    wanted = yaml.safe_load(example)["trainer"]
    assert list(built) == list(wanted)
    listed = list(zip(built.get("callbacks", []), wanted.get("callbacks", []), strict=True))
    if "strategy" in wanted:
        listed.append((built["strategy"], wanted["strategy"]))
    assert name in [type(made).__name__ for made, _ in listed]
    for made, entry in listed:
        assert entry["class_path"].endswith(f".{type(made).__name__}")
        given = entry.get("init_args", {})
        assert plain({key: made.settings[key] for key in given}) == plain(given)


class Rounding:
    """Round.

    Args:
        digits: Number of digits. More text.
        where: A place.
    """

    def __init__(self, digits: int, where: str = "here") -> None: ...


def test_an_argument_may_have_no_default() -> None:
    digits, where = arguments_of(Rounding)
    assert (digits.name, digits.kind, digits.help, digits.is_required) == ("digits", "int", "Number of digits.", True)
    assert (where.default, where.is_required) == ("here", False)


@cases(
    ("name", "hint"),
    [
        ("ZClop", "Did you mean 'ZClip'?"),
        ("nmsparsity", "Did you mean 'NMSparsity'?"),
        ("quantum", "`lightning-grad list`"),
    ],
)
def test_an_unknown_name_is_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["show", name])
    assert str(caught.value).startswith(f"error: there is no technique {name!r}.")
    assert hint in str(caught.value)


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_grad", "show", "ZClop"])
    with pytest.raises(SystemExit, match=r"^error: there is no technique 'ZClop'"):
        runpy.run_module("lightning_grad", run_name="__main__")


def test_the_console_script_is_the_same_function() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["lightning-grad"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
