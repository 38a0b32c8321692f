"""The shape of the token tree that a decode step grows and verifies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specexit import checks

MAX_NODES = 256  # verify_tree holds a node's ancestors in 256 bits
MAX_TOP_K = 16
# Rows of a bf16 forward at which an H200's arithmetic takes as long as reading the weights: 2 FLOPs a row and 2 bytes a
# weight, 790 TFLOP/s and 4.3 TB/s.
RIDGE = 184


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
    def suited_to(cls, device: torch.device, batch: int = 1) -> TreeConfig:
        """A tree for each of `batch` sequences that costs little more than one token each.

        On a GPU a forward reads the weights once, and its arithmetic is free up to RIDGE rows; beyond them a node costs
        what it computes. On a CPU every node costs: a chain pays best.
        """
        if device.type != "cuda":
            return cls.chain(8)
        nodes = min(RIDGE // max(batch, 1), cls.nodes)
        if nodes < 2:
            return cls.none()
        if nodes <= 8:  # too few to branch
            return cls.chain(nodes - 1)
        return cls(nodes=nodes, top_k=min(nodes // 4, cls.top_k))

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
