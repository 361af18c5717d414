"""Studies: claims about techniques, each measured over several seeds. ``python -m studies`` runs them.

- ``claims/``: what each family claims, and how a training of it runs. Nothing else has to be written for a new claim.
- ``claims/known/``: what papers claim. Arms are data (``arms.py``), trained on shared tasks (``tasks.py``, ``on_task.py``).
  ``pretrained.py`` is for arms that start from the same pretrained model.
- ``figures/``: tables and figures of single families, for the documentation and ``make demo``.
- ``runner.py`` runs claims, ``results.py`` stores every training as a line, ``verdict.py`` judges, ``report.py`` prints.
- ``sources.py`` follows the code on which the results of a claim depend.
- ``evidence.py`` makes rows of all results; ``page.py`` and ``forest.py`` write and draw them, for ``docs/evidence.md``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "examples"))  # plain_project, the Lightning project that all studies train
