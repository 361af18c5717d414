"""Which built-in nodes of the autograd graph are linear, by kind.

A kind that is not listed is refused. So a list that is too short costs a refusal, never a wrong value.
"""

from __future__ import annotations

# Linear in all inputs with a graph, taken together.
LINEAR = frozenset(
    """
    Add Sub Rsub Neg Mean Sum Nansum Trace Cumsum
    Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Expand Clone ToCopy Copy CopySlices
    Permute Transpose T Movedim AsStrided Diagonal Flip Roll Repeat ConstantPadNd
    Select Slice Index IndexSelect MaskedSelect Gather Take Where MaskedFill
    Stack Cat Unbind Split SplitWithSizes IndexAdd IndexPut IndexPutImpl ScatterAdd
    """.split()
)
# Linear in one input, as long as only that one depends on samples.
SCALED = frozenset(("Mul", "Addcmul"))
# Products that sum over a dimension.
CONTRACTING = frozenset(("Dot", "Mv", "Mm", "Bmm", "Addmm", "Addmv", "Baddbmm"))
# Here an input without a graph is added, so it is a part of the constant.
ADDING = frozenset(("Add", "Sub", "Rsub", "Stack", "Cat", "Where", "MaskedFill", "CopySlices", "IndexPut", "Copy"))
# Passing through these, one input keeps its rows or is told where they went, and nothing is added: see `Values`.
HOMOGENEOUS = frozenset(
    """
    Neg Mean Sum Nansum Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Expand Clone ToCopy
    Select Slice Index IndexSelect MaskedSelect Gather Where MaskedFill Mul Div
    """.split()
)
# Of these, the ones that give each position the same coefficient.
REDUCING = frozenset("Mean Sum Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Clone ToCopy".split())
