"""The ops that run in every layer and level, without their argument checks.

For a caller whose arguments have the same dtypes, strides and devices in every call, and shapes that fit: it has the
public function, or `check_arguments`, look at them once. On a CPU the checks would be a twentieth of a small model's
decode step. Arguments are positional, in the order of the public signature; a call may be anything that it refuses.
"""

from specexit_kernels.draft_topk import OP as draft_topk
from specexit_kernels.tree_attention import OP as tree_attention

__all__ = ["draft_topk", "tree_attention"]
