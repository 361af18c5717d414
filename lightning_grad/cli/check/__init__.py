"""``lightning-grad check``: try all techniques on the user's own module and data.

``sources.py`` and ``config.py`` build the project, ``short_data.py`` shortens its loaders and ``short_trainer.py`` its
Trainer. ``trial.py`` makes one fit, which ``watch.py`` measures; ``rounds.py`` makes all of them, ``ranks.py`` those of
strategies. ``rows.py`` collects the results, and ``report.py`` writes the table.
"""

from lightning_grad.cli.check.command import add_command

__all__ = ["add_command"]
