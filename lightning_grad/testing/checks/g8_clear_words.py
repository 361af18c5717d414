"""G8: the callback can be written in a config, and says each thing once."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning_grad.testing.checks.registry import GuaranteeError, check
from lightning_grad.testing.environment import hidden
from lightning_grad.testing.lines import line_of_class
from lightning_grad.testing.states import assert_identical
from lightning_grad.testing.subject import NotApplicableError, Subject


@check("quick")
def g8_warns_once(subject: Subject) -> str:
    """A fit gives no warning twice that a fit without the callback does not give; numbers in it do not count."""
    plain = {_without_numbers(text) for text in subject.plain.bare().warned}
    own = [text for text in subject.bare().warned if _without_numbers(text) not in plain]
    for pattern, count in Counter(map(_without_numbers, own)).items():
        if count > 1:
            text = next(text for text in own if _without_numbers(text) == pattern)
            raise GuaranteeError(f"It warns {count} times in one fit: {text}")
    return f"It warns: {' | '.join(own)}" if own else ""


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "0", text)


@check("quick")
def g8_yaml_round_trip(subject: Subject) -> None:
    """LightningCLI builds it with the same arguments from a YAML file, and again from the config that it writes of that."""
    class_path, arguments = importable_path(subject.kind), _arguments(subject)
    yaml, parser = _modules_or_skip()
    callback = {"class_path": class_path, "init_args": arguments}
    text = yaml.safe_dump({"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [callback]}})
    for source in ("a YAML file", "the config that it writes itself"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            path.write_text(text)
            try:
                # The parser prints its usage and exits, and reads no other command line.
                with hidden(), patch.object(sys, "argv", sys.argv[:1]), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    parsed = parser.parse_path(path)
                    parser.instantiate_classes(parsed)
            except (Exception, SystemExit) as error:
                words = _reason(str(error.__context__ or error))
                raise GuaranteeError(f"LightningCLI cannot build it from {source}: {words}", _line(subject)) from error
        (callback,) = parsed.trainer.callbacks
        given = {name: _yaml_value(name, callback.init_args[name]) for name in arguments}
        assert_identical(arguments, given, f"arguments from {source}: ")
        text = parser.dump(parsed, skip_none=False)


def _reason(words: str) -> str:
    """Return what the parser says of the callback; the rest lists all types that a callback may have."""
    patterns = (
        r"Problem with given class_path [^\n]*\n(.*?)(?=\n *- |\Z)",
        r"Errors:\n[ -]*(.*?)(?=\n *- Not a valid|\Z)",
    )
    found = re.search(patterns[0], words, re.S) or re.search(patterns[1], words, re.S)
    return " ".join((found.group(1) if found else words).split())


def _line(subject: Subject) -> str:
    return line_of_class(subject.kind, "__init__")


def _modules_or_skip() -> tuple[Any, Any]:
    """Return PyYAML, and the parser of a LightningCLI."""
    try:
        importlib.import_module("jsonargparse")
    except ImportError as error:
        raise NotApplicableError("jsonargparse is not installed, which LightningCLI needs.") from error
    return importlib.import_module("yaml"), _parser()


@functools.cache  # it reads all arguments of the Trainer
def _parser() -> Any:
    cli = importlib.import_module("lightning.pytorch.cli").LightningCLI
    model = importlib.import_module("lightning.pytorch.demos.boring_classes").BoringModel
    given = {"run": False, "save_config_callback": None, "seed_everything_default": False}
    with hidden(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cli(model, args=["--trainer.accelerator=cpu", "--trainer.logger=false"], **given).parser


def importable_path(kind: type) -> str:
    """Return the shortest path that the class can be imported from."""
    if "<locals>" in kind.__qualname__ or kind.__module__ == "__main__":
        raise NotApplicableError("The class is not in a module that a config could name.")
    parts = kind.__module__.split(".")
    for length in range(1, len(parts) + 1):
        package = ".".join(parts[:length])
        if getattr(importlib.import_module(package), kind.__name__, None) is kind:
            return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _arguments(subject: Subject) -> dict[str, Any]:
    """Return the arguments that the constructor gets, as YAML holds them."""
    kind, calls = subject.kind, list[inspect.BoundArguments]()
    init, signature = kind.__init__, inspect.signature(kind.__init__)  # type: ignore[misc]

    def recording(self: Any, *arguments: Any, **keywords: Any) -> None:
        if type(self) is kind:
            calls.append(signature.bind(self, *arguments, **keywords))
        init(self, *arguments, **keywords)

    with patch.object(kind, "__init__", recording):
        subject.built()
    found: dict[str, Any] = {}
    for name, value in list(calls[0].arguments.items())[1:]:
        how = signature.parameters[name].kind
        if how is inspect.Parameter.VAR_POSITIONAL and value:
            raise GuaranteeError(f"It takes *{name}, which a config cannot give.", _line(subject))
        found |= value if how is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {name: _yaml_value(name, value) for name, value in found.items()}


def _yaml_value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _yaml_value(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_value(name, item) for item in value]
    raise NotApplicableError(f"It is built with {name} of type {type(value).__name__}, which YAML cannot hold.")
