"""Read a project from a config of LightningCLI."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_grad.cli.check.sources import Run, TargetError

_SEED = 7
_OF_FIT = ("ckpt_path", "weights_only")  # arguments of `fit` that a saved config may have
_OFF = ("logger", "profiler")  # arguments of the Trainer that would write files


class ConfigSource:
    """A project that a config of LightningCLI describes, with the callbacks that it lists.

    Args:
        path: Path of the file.

    Raises:
        TargetError: If the file cannot be read, or is not such a config.
    """

    def __init__(self, path: str) -> None:
        self._cli = _read(path)

    def make(self) -> Run:
        """Instantiate the classes of the config after seeding."""
        pl.seed_everything(_SEED, verbose=False)
        self._cli.instantiate_classes()
        arguments: dict[str, Any] = dict(self._cli.trainer)
        data = {} if self._cli.datamodule is None else {"datamodule": self._cli.datamodule}
        return Run(self._cli.model, data, arguments)


def _read(path: str) -> Any:
    """Parse a config, without building a Trainer."""
    try:
        from jsonargparse import ArgumentError
        from lightning.pytorch.cli import LightningCLI
    except ModuleNotFoundError:
        raise TargetError("a config needs jsonargparse. Run: pip install 'lightning-grad[cli]'.") from None

    class Reader(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            for name in _OF_FIT:
                parser.add_argument(f"--{name}", type=Any, default=None)

        def before_instantiate_classes(self) -> None:
            for name in _OFF:
                self.config.trainer[name] = None

        def instantiate_classes(self) -> None:
            if self.is_read:
                super().instantiate_classes()

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            given: Mapping[str, Any] = self.config_init.get("trainer", {})
            listed = given["callbacks"] or []
            extra = [self.config_init.get(key) for key in self.parser.callback_keys]
            callbacks: list[Callback] = [*(listed if isinstance(listed, list) else [listed]), *extra]
            return {**given, **kwargs, "callbacks": callbacks}

        is_read = False

    try:
        cli = Reader(
            save_config_callback=None,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
            args=["--config", path],
            run=False,
        )
    except ArgumentError as error:
        raise TargetError(f"{path} does not load: {error}") from None
    cli.is_read = True
    return cli
