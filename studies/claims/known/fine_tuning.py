"""What trains few parameters of a pretrained model, and what forgets samples."""

from __future__ import annotations

from studies.on_task import OnTask

CLAIMS: tuple[OnTask, ...] = ()
