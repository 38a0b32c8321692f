"""The ops that run in every layer and level, without their argument checks.

For a caller whose arguments have the same dtypes, strides and devices in every call, and shapes that fit: it has
`check_arguments` of the op's module look at them once. On a CPU the checks would be a twentieth of a small model's
decode step. Arguments are positional, in the order of the public signature; with others the result is undefined.
"""

from specexit_kernels.draft_topk import OP as DRAFT_TOPK
from specexit_kernels.tree_attention import OP as TREE_ATTENTION

draft_topk = DRAFT_TOPK
tree_attention = TREE_ATTENTION

__all__ = ["draft_topk", "tree_attention"]
