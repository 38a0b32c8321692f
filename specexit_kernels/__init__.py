"""Operators of speculative decoding with early exit: stateless functions on tensors, each with its PyTorch twin."""

from specexit_kernels._op import implementations
from specexit_kernels._version import __version__
from specexit_kernels.accept import accept
from specexit_kernels.build_tree import build_tree
from specexit_kernels.compact_kv import compact_kv
from specexit_kernels.decide_exit import decide_exit
from specexit_kernels.draft_topk import draft_topk
from specexit_kernels.environment import environment
from specexit_kernels.grow_beam import grow_beam
from specexit_kernels.grow_level import grow_level
from specexit_kernels.project_features import project_features
from specexit_kernels.sample_targets import sample_targets
from specexit_kernels.signals import activate_signals
from specexit_kernels.state import DecodeState, ExitReason, ExitRules, Finish, Smoothing, Tree
from specexit_kernels.tree_attention import tree_attention
from specexit_kernels.verify_tree import verify_tree

__all__ = [
    "DecodeState",
    "ExitReason",
    "ExitRules",
    "Finish",
    "Smoothing",
    "Tree",
    "__version__",
    "accept",
    "activate_signals",
    "build_tree",
    "compact_kv",
    "decide_exit",
    "draft_topk",
    "environment",
    "grow_beam",
    "grow_level",
    "implementations",
    "project_features",
    "sample_targets",
    "tree_attention",
    "verify_tree",
]
