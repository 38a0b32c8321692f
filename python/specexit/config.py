"""The shape of the token tree that a decode step grows and verifies."""

from __future__ import annotations

from dataclasses import dataclass

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
        for name in ("nodes", "depth", "top_k"):
            _check_int(name, getattr(self, name))
        if not 1 <= self.nodes <= MAX_NODES:
            raise ValueError(f"nodes must be between 1 and {MAX_NODES}, was {self.nodes}")
        if self.nodes == 1:
            return
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1 where nodes > 1, was {self.depth}; see TreeConfig.none()")
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k must be between 1 and {MAX_TOP_K}, was {self.top_k}")

    @classmethod
    def chain(cls, length: int) -> TreeConfig:
        """The `length` most likely tokens in a row."""
        _check_int("length", length)
        if not 1 <= length < MAX_NODES:
            raise ValueError(f"length must be between 1 and {MAX_NODES - 1}, was {length}")
        return cls(nodes=length + 1, depth=length, top_k=1)

    @classmethod
    def none(cls) -> TreeConfig:
        """No speculation: one token a step. The draft then only reads signals."""
        return cls(nodes=1, depth=0, top_k=1)

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


def _check_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, was {type(value).__name__}")
