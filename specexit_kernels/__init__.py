"""Operators of speculative decoding with early exit: stateless functions on tensors, each with its PyTorch twin."""

from specexit_kernels._op import implementations
from specexit_kernels._version import __version__
from specexit_kernels.build_tree import build_tree
from specexit_kernels.environment import environment
from specexit_kernels.grow_beam import grow_beam
from specexit_kernels.verify_tree import verify_tree

__all__ = ["__version__", "build_tree", "environment", "grow_beam", "implementations", "verify_tree"]
