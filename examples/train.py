"""The command line of the plain project.

::

    python examples/train.py fit --model VisionTransformer --data Digits --trainer.max_epochs 25
    python examples/train.py fit --config run.yaml
"""

import plain_project  # noqa: F401  (registers the short names of models and data)
from lightning.pytorch.cli import ArgsType, LightningCLI


def main(args: ArgsType = None) -> LightningCLI:
    """Run the command line with ``args``, by default those of the process."""
    return LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        args=args,
    )


if __name__ == "__main__":
    main()
