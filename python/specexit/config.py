"""The shape of the token tree that a decode step grows and verifies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specexit import checks

MAX_NODES = 256  # verify_tree holds a node's ancestors in 256 bits
MAX_TOP_K = 16


@dataclass(frozen=True)
class TreeConfig:
    """How many tokens a step verifies, and how the draft looks for them (a dynamic tree, as EAGLE-2's).

    nodes   T, tokens verified in one forward of the base, the root included, 1 to 256. 1: no speculation; depth and
            top_k then mean nothing
    depth   tokens on the longest path below the root, at least 1. `max_depth` is what `nodes` leaves of it
    top_k   children that the draft proposes for a node, and nodes that it extends on a level, 1 to 16. 1: a chain

    The draft proposes `candidates` tokens, and the best nodes - 1 of them are verified. Where there are fewer
    candidates, the rest of the nodes is inert: computed for nothing.
    Raises TypeError or ValueError for a field that is not such a number.
    """

    nodes: int = 60
    depth: int = 7
    top_k: int = 10

    def __post_init__(self) -> None:
        checks.integer("nodes", self.nodes, 1, MAX_NODES)
        tree = self.nodes > 1
        checks.integer("depth", self.depth, 1 if tree else 0)
        checks.integer("top_k", self.top_k, 1 if tree else 0, MAX_TOP_K if tree else None)

    @classmethod
    def chain(cls, length: int) -> TreeConfig:
        """The `length` most likely tokens in a row."""
        checks.integer("length", length, 1, MAX_NODES - 1)
        return cls(nodes=length + 1, depth=length, top_k=1)

    @classmethod
    def none(cls) -> TreeConfig:
        """No speculation: one token a step. The draft then only reads signals."""
        return cls(nodes=1, depth=0, top_k=1)

    @classmethod
    def suited_to(cls, device: torch.device) -> TreeConfig:
        """On a GPU a forward over 60 nodes costs what one over 1 does; on a CPU every node costs: a chain pays best."""
        return cls() if device.type == "cuda" else cls.chain(8)

    @property
    def max_depth(self) -> int:
        """D: depth of the deepest node that can be verified; 0 without speculation."""
        return min(self.depth, self.nodes - 1)

    @property
    def is_chain(self) -> bool:
        """Whether the draft proposes nothing but one chain, and all nodes are that chain."""
        return self.candidates == self.max_depth == self.nodes - 1

    @property
    def candidates(self) -> int:
        """C: tokens that the draft proposes: top_k of the root, and top_k of each of top_k nodes a level below."""
        if self.max_depth == 0:
            return 0
        return self.top_k + self.top_k**2 * (self.max_depth - 1)


def check_tree(tree: object) -> TreeConfig:
    """Raise TypeError for what is no tree."""
    if not isinstance(tree, TreeConfig):
        raise TypeError(f"tree must be a TreeConfig, was {type(tree).__name__}")
    return tree
