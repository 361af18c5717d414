"""Find the output dimension of a weight, from what the layer computes and not from its class.

``nn.Linear`` computes :math:`x W^T` with a weight (out, in). Others compute :math:`x W` with a weight (in, out), such
as the ``Conv1D`` of GPT-2 in transformers, and graph libraries have their own linear layers. The shape of a square
weight does not show the layout, so the layer is run once on random numbers and its output compared with both products.
"""

import contextlib
import copy
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_grad.functional.gradients.tensor_lists import whole
from lightning_grad.utilities.forward_order import has_torch_forward
from lightning_grad.utilities.parameters import clean_name, named_owners

_ROWS = 3
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}  # TF32 keeps 10 bits
_HALF_TOLERANCE = 5e-2
_STATE = "__composable_api_state_key"
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def output_dimension(owner: nn.Module, attribute: str) -> int | None:
    """Return the output dimension of a weight.

    For torch's own layers it is 0. For a matrix of any other module, a copy of the layer with a random weight is run on
    random rows in eval mode. The dimension is 0 if the output is a multiple of :math:`x W^T`, and 1 if it is a multiple
    of :math:`x W`.

    Args:
        owner: The module that owns the parameter.
        attribute: Name of the parameter in its owner.

    Returns:
        int | None: 0 or 1, and ``None`` if the output is neither product. It is 0 for subclasses of ``nn.Linear`` with
        another output, and for parameters that are not matrices.

    Example:
        >>> class Transposed(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.eye(2))
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> output_dimension(nn.Linear(2, 2), "weight"), output_dimension(Transposed(), "weight")
        (0, 1)
    """
    if not is_foreign_matrix(owner, attribute):
        return 0
    found = _product_dimension(owner, attribute)
    return 0 if found is None and isinstance(owner, nn.Linear) else found


def multiplies_by(owner: nn.Module, attribute: str) -> bool:
    """Return True if a module is a linear layer (``nn.Linear`` or similar) that multiplies its input by this matrix."""
    if isinstance(owner, nn.Linear):
        return attribute == "weight"
    return is_foreign_matrix(owner, attribute) and _product_dimension(owner, attribute) is not None


def is_foreign_matrix(owner: nn.Module, attribute: str) -> bool:
    """Return True if a parameter is a matrix of a module with a custom ``forward``."""
    return _is_matrix(owner._parameters[attribute]) and not has_torch_forward(owner)


def output_dimensions(module: nn.Module) -> tuple[dict[int, int], list[str]]:
    """Return the output dimensions of all parameters of a module.

    Args:
        module: Any module.

    Returns:
        tuple: A dict from the ids of parameters whose outputs are in dimension 1 to 1, and the names of parameters with
        unknown layout, because a tied parameter is used in both ways or the layer computes something else.
    """
    found: dict[int, set[int | None]] = {}
    names: dict[int, str] = {}
    for name, owner, attribute in named_owners(module):
        parameter = owner._parameters[attribute]
        if is_foreign_matrix(owner, attribute) or isinstance(owner, nn.Linear):
            names.setdefault(id(parameter), clean_name(name))
            found.setdefault(id(parameter), set()).add(output_dimension(owner, attribute))
    second = {key: 1 for key, dimensions in found.items() if dimensions - {None} == {1}}
    unknown = [names[key] for key, dimensions in found.items() if len(dimensions - {None}) != 1]
    return second, unknown


def _is_matrix(parameter: Tensor | None) -> bool:
    known = isinstance(parameter, Tensor) and not isinstance(parameter, UninitializedParameter)
    return known and parameter.ndim == 2 and parameter.is_floating_point()  # type: ignore[union-attr]


def _product_dimension(owner: nn.Module, attribute: str) -> int | None:
    if hasattr(owner, "configure_optimizers"):
        return None  # the forward of a LightningModule runs the whole network
    parameter = owner._parameters[attribute]
    assert parameter is not None
    if parameter.is_meta:
        return None
    try:
        with _unnoticed(parameter.device):
            return _compare_products(_with_weight(owner, attribute), parameter)
    except Exception:  # unknown: the layer does not accept rows of numbers
        return None


@contextlib.contextmanager
def _unnoticed(device: torch.device) -> Iterator[None]:
    # Compiled code would trace the probe. If dynamo is not imported, nothing is compiled, and importing it takes
    # seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), eager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            yield


def _with_weight(owner: nn.Module, attribute: str) -> Callable[[Tensor, Tensor], Any]:
    """Return the layer as a function of (input, weight), on a copy that shares its other parameters."""
    shared: dict[int, Any] = {id(parameter): whole(parameter) for parameter in owner.parameters()}
    twin = _copy_of(owner, shared).eval()
    forward = getattr(twin.forward, "_torchdynamo_orig_callable", twin.forward)

    def run(inputs: Tensor, weight: Tensor) -> Any:
        twin._parameters[attribute] = nn.Parameter(weight, requires_grad=False)
        return forward(inputs)

    return run


def _copy_of(owner: nn.Module, shared: dict[int, Any]) -> nn.Module:
    """Return a copy of a layer; under ``fully_shard``, whose layers refuse to be copied, one of its original class."""
    if "FSDPModule" not in (cls.__name__ for cls in type(owner).__mro__):
        return copy.deepcopy(owner, shared)
    twin: nn.Module = object.__new__(type(owner).__bases__[1])
    nn.Module.__init__(twin)
    # The hooks and the state of fully_shard gather the shards of the layer itself.
    own = {name: value for name, value in vars(owner).items() if not (name.endswith(_HOOKS) or name.startswith(_STATE))}
    vars(twin).update(copy.deepcopy(own, shared))
    return twin


def _compare_products(run: Callable[[Tensor, Tensor], Any], like: Tensor) -> int | None:
    """Return which of the products x W^T and x W the layer computes up to a factor; None if not exactly one."""
    generator = torch.Generator(like.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)

    weight = draw(*like.shape)
    matches = []
    for dimension, factor in ((0, weight.t()), (1, weight)):
        for leading in ((_ROWS,), (1, _ROWS)):  # some layers accept only sequences
            inputs = draw(*leading, factor.shape[0])
            try:
                output = run(inputs, weight) - run(torch.zeros_like(inputs), weight)  # without the bias
            except Exception:
                continue
            if _is_multiple(output, inputs @ factor):
                matches.append(dimension)
            break
    return matches[0] if len(matches) == 1 else None


def _is_multiple(output: Tensor, product: Tensor) -> bool:
    if output.shape != product.shape:
        return False
    tolerance = _TOLERANCE.get(output.dtype, _HALF_TOLERANCE)
    output, product = output.double(), product.double()
    scale = (output * product).sum() / product.square().sum()
    return bool(output.norm() > 0 and (output - scale * product).norm() <= tolerance * output.norm())
