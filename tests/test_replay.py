"""A decode step that was recorded once decodes on by replay: what a CUDA graph asks of it, tried on a CPU.

The recording is the step's tensor operations with the tensors that they took, and nothing of its Python. A replay runs
them again: tensors that the step made are made anew, all others are read and written where they were. So a step that
kept a value in a Python variable, or in a tensor that it made, would go on from the recording's and not from the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_no_sync import SAMPLING, TREES, prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, AutoTokenizer

from specexit import SpecExitDecoder, TreeConfig, bundled_pair, pool
from specexit_kernels._op import OPS


class Recording(TorchDispatchMode):
    """The operations of a function, in order: what `CudaGraph` is on a GPU. Recording executes them, so that the first
    replay is done already."""

    nbytes = 0
    replays = 0  # of all recordings; a test sets it to 0

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.done = True
        with self:
            function()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))  # holds every tensor, so that no id comes twice
        return out

    def replay(self) -> None:
        if self.done:
            self.done = False
            return
        Recording.replays += 1
        made: dict[int, Tensor] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, out in self.calls:
            new = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor):
                    made.setdefault(id(old), value)  # an operation in place returns what it was given

    def reset(self) -> None:
        self.calls.clear()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders made in the test record their steps, and keep their engines, as on a GPU."""
    for op in OPS.values():  # the twins: what the CPU has of its own may read tensors
        monkeypatch.setattr(op, "cpu", op.twin)
    monkeypatch.setattr(pool, "recorder", lambda device: Recording)
    initialise = pool.Pool.__init__

    def keeping(self: pool.Pool, *arguments: Any) -> None:
        initialise(self, *arguments)
        self.keep = 2

    monkeypatch.setattr(pool.Pool, "__init__", keeping)
    monkeypatch.setattr(Recording, "replays", 0)


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_replay_decodes_the_same(
    tree: TreeConfig, options: dict[str, Any], recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = bundled_pair()
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    decoders = [
        SpecExitDecoder.from_pretrained(model, pair.draft, tokenizer=tokenizer, tree=tree, capacity=420, graph=graph)
        for graph in (False, True)
    ]
    call = {**prompts(tokenizer), "max_new_tokens": 220 if tree.nodes > 1 else 60, **options}
    expected, out = (decoder.generate(**call) for decoder in decoders)
    assert Recording.replays > 20
    assert out.new_tokens == expected.new_tokens
    if tree.nodes > 1 and options["temperature"] == 0:
        assert any(stats.exit_position is not None for stats in out.stats), "no exit was replayed"
    assert out.stats == expected.stats
