"""From logits to the base's own token at every node.

Drafts are deterministic, so sampling the base at each node and following the child that matches *is* lossless
rejection sampling. The noise depends on (seed, position, token id) alone: the text is the same for every tree shape,
for a chain, without speculation, and in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from specexit import checks
from specexit.job import Job
from specexit_kernels import DecodeState, Tree, sample_targets

_MASK = 2**64 - 1


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn; None switches a filter off, temperature 0 is greedy.

    Raises TypeError for what is no number, ValueError for one out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, 0)
        if self.top_k is not None:
            checks.integer("top_k", self.top_k, 0)
        if self.top_p is not None:
            checks.number("top_p", self.top_p, 0, 1)
            if self.top_p == 0:
                raise ValueError(f"top_p must be above 0, was {self.top_p}")
        if self.min_p is not None:
            checks.number("min_p", self.min_p, 0, 1)


def seeds_of(seed: int | Sequence[int] | None) -> Iterator[int]:
    """A seed for each row: drawn from torch's generator (None), derived from one int and the row's index, or given.

    Duplicate prompts get different seeds from one int, so different samples. Given ones end with the sequence.
    Raises TypeError for a seed that is neither.
    """
    if seed is None:
        return iter(lambda: int(torch.randint(0, 2**62, ())), None)
    if isinstance(seed, int):
        first = _mix(seed & _MASK)
        return (_mix(first + index) for index in count())
    if isinstance(seed, str) or not isinstance(seed, Sequence):
        raise TypeError(f"seed must be an int or one a prompt, was {type(seed).__name__}")
    for value in seed:
        if not isinstance(value, int):
            raise TypeError(f"seed must hold ints, was {type(value).__name__}")
    return map(_signed, seed)


def row_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """The seeds of a batch. Raises TypeError or ValueError for what does not say one for each row."""
    seeds = seeds_of(seed)
    if isinstance(seed, Sequence) and len(seed) != batch:
        raise ValueError(f"seed must be one int or one a prompt ({batch}), was {len(seed)} of them")
    return list(islice(seeds, batch))


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), on the next value of its sequence."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return _signed(value ^ (value >> 31))


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, which is what a tensor of seeds holds."""
    value &= _MASK
    return value - 2**64 if value >> 63 else value


class Choose(Protocol):
    """The base's token at every node of a batch of trees, for B slots that hold sequences or none."""

    def __call__(self, logits: Tensor, tree: Tree, state: DecodeState) -> Tensor:
        """logits [B, T, V] -> targets [B, T] int32: the token after each node, by the base alone."""
        ...

    def seat(self, first: int, jobs: Sequence[Job]) -> None:
        """From now on the slots from `first` on hold these."""
        ...

    def rows(self, first: int, count: int) -> Choose:
        """The same for the slots [first, first + count) alone."""
        ...


class Sampler:
    """Draws the base's tokens; one op, no host in it.

    config  shared by the rows
    batch   B
    nodes   T: no tree has more
    """

    def __init__(self, config: SamplingConfig, batch: int, nodes: int, device: torch.device) -> None:
        self.config = config

        def full(value: float | None, dtype: torch.dtype) -> Tensor | None:
            if value is None or (config.temperature == 0 and dtype != torch.int64):
                return None
            return torch.full((batch, nodes), value, dtype=dtype, device=device)

        # Every node has its own: the op's rows are nodes.
        self._arguments = {
            "seeds": full(0, torch.int64),
            "temperature": full(config.temperature, torch.float32),
            "top_k": full(config.top_k, torch.int32),
            "top_p": full(config.top_p, torch.float32),
            "min_p": full(config.min_p, torch.float32),
        }

    def __call__(self, logits: Tensor, tree: Tree, state: DecodeState) -> Tensor:
        # A node at depth d stands at position L + d; its target is the token of the position after it.
        positions = state.lengths.unsqueeze(1) + (tree.depth + 1)
        targets = sample_targets(logits.flatten(0, 1), positions.flatten(), **self._of_nodes(tree.tokens.shape[1]))
        return targets.view(tree.tokens.shape)

    def seat(self, first: int, jobs: Sequence[Job]) -> None:
        seeds = self._arguments["seeds"]
        assert seeds is not None
        host = torch.tensor([job.seed for job in jobs], dtype=torch.int64, pin_memory=seeds.is_cuda)
        seeds[first : first + len(jobs)] = host.to(seeds.device, non_blocking=True).unsqueeze(1)

    def rows(self, first: int, count: int) -> Sampler:
        part = object.__new__(Sampler)
        part.config = self.config
        part._arguments = {name: x if x is None else x[first : first + count] for name, x in self._arguments.items()}
        return part

    def draw(self, logits: Tensor, row: int, position: int) -> Tensor:
        """One token, [1] int32: of `row` at `position`, from logits [1, V]."""
        at = torch.tensor([position], dtype=torch.int32, device=logits.device)
        return sample_targets(logits, at, **self.rows(row, 1)._of_nodes(1))

    def _of_nodes(self, nodes: int) -> dict[str, Any]:
        """What `sample_targets` takes besides logits and positions; a view where the trees have all their nodes."""
        return {name: x if x is None else x[:, :nodes].reshape(-1) for name, x in self._arguments.items()}
