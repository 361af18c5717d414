"""Which built-in nodes of the autograd graph are linear, by kind, in what depends on samples.

A kind that is not listed is refused. So a list that is too short costs a refusal, never a wrong value.
"""

from collections.abc import Sequence


def _kinds(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Linear in all inputs with a graph, taken together.
LINEAR = _kinds(
    """
    Add Sub Rsub Neg Mean Sum Nansum Trace Cumsum
    Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Expand Clone ToCopy Copy CopySlices
    Permute Transpose T Movedim AsStrided Diagonal Flip Roll Repeat ConstantPadNd
    Select Slice Index IndexSelect MaskedSelect Gather Take Where MaskedFill
    Stack Cat Unbind Split SplitWithSizes IndexAdd IndexPut IndexPutImpl ScatterAdd
    """
)
# Leave a finite number as it is.
GUARDING = _kinds("NanToNum")
# Linear in one input, as long as only that one depends on samples. Div is so in its first.
SCALED = _kinds("Mul Addcmul")
# Products that sum over a dimension.
CONTRACTING = _kinds("Dot Mv Mm Bmm Addmm Addmv Baddbmm")
# All through which a walk goes.
PASSED = LINEAR | SCALED | CONTRACTING | {"Div"}
# Here an input without a graph is added, so it is a part of the constant.
ADDING = _kinds("Add Sub Rsub Stack Cat Where MaskedFill CopySlices IndexPut IndexPutImpl Copy")
# Through these, coefficients can be pushed further down by the rows of one input, to below the masks: see `Values`.
HOMOGENEOUS = _kinds(
    """
    Neg Mean Sum Nansum Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Expand Clone ToCopy
    Select Slice Index IndexSelect MaskedSelect Gather Where MaskedFill Mul Div
    """
)


def is_linear(kind: str, hits: Sequence[bool]) -> bool:
    """Return whether a node is linear in those of its inputs that depend on samples.

    Args:
        kind: Of the node.
        hits: Which of its inputs do.
    """
    if kind in LINEAR:
        return True
    return sum(hits) == 1 and (kind in SCALED or kind in CONTRACTING or (kind == "Div" and hits[0]))
