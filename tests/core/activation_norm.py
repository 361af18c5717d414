"""A probe as an author outside the package writes it, from public names only."""

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.core import ProbeCallback, ProbeLook, Reading


class ActivationNorm(ProbeCallback):
    """Log the norm of one layer's output, the mean over some samples."""

    namespace = "activations"

    def __init__(
        self,
        layer: str,
        samples: int = 8,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(samples, every_n_epochs, every_n_steps, name=name)
        self.layer = layer

    @override
    def probe(self, look: ProbeLook) -> Reading:
        outputs: list[Tensor] = []
        layer = look.pl_module.get_submodule(self.layer)
        look.undo.push(layer.register_forward_hook(lambda _, args, output: outputs.append(output)).remove)
        look.run()
        norms = torch.cat(outputs).flatten(1).norm(dim=1)
        return Reading({"norm": norms.mean()}, arrays={"norms": norms})
