"""One process, or several that `accelerate launch` has started: their sums, and who writes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Processes:
    """rank   of this one, from 0
    count  of them
    device  that accelerate gives this one; None: whichever the caller likes
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Until all of them are here."""
        if self.count > 1:
            distributed.barrier()


def find_processes(cpu: bool = False) -> Processes:
    """The processes that a launcher has started, by its environment (WORLD_SIZE); else this one alone.

    cpu  they compute on the CPU
    Raises ImportError where several need accelerate, and it is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError(
            "several processes need accelerate, which is not installed: pip install accelerate, or start one process"
        ) from None
    state = PartialState(cpu=cpu)
    return Processes(state.process_index, state.num_processes, state.device)
