"""The command line, ``lightning-grad``: list and show techniques, compare score files, and try techniques on a project.

Each command has a module here. They may import all other packages, and no other package imports them.
"""

from lightning_grad.cli.main import main

__all__ = ["main"]
