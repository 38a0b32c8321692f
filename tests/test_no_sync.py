"""A decode step never waits for the device, keeps its addresses, and does the same work whatever the data is.

On a CPU nothing would be lost by asking a tensor for its value; these tests see to it that a GPU is never asked. A
dispatch mode sees every operation of the base, the draft and the twins; it does not look inside an operator of ours, so
their twins are called directly. (What stands in for a twin on a CPU may well look at a value: there it is free.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from specexit import ExitConfig, SpecExitDecoder, TreeConfig
from specexit.bundled import bundled_pair, load_problems
from specexit.capture import waits
from specexit.engine import Engine
from specexit.memory import tensors_in
from specexit_kernels._op import OPS


class Watch(TorchDispatchMode):
    """Records what runs, and the shapes that come out; refuses what would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, list[list[int]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert not waits(func, args), f"{func} waits for the device"
        assert not str(func).startswith("specexit."), "an operator hides what is inside: call its function"
        out = func(*args, **(kwargs or {}))
        shapes = [list(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.log.append((str(func), shapes))
        return out


def forbidden(name: str) -> Callable[..., Any]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"Tensor.{name} waits for the device")

    return refuse


class Watcher:
    """Watches what an engine captures on a GPU: the same step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.logs: list[list[tuple[str, list[list[int]]]]] = []
        self.addresses: list[list[int]] = []
        run = Engine._run
        monkeypatch.setattr(Engine, "_run", lambda engine: self.watched(engine, run))

    def watched(self, engine: Engine, run: Callable[[Engine], None]) -> None:
        with self.monkeypatch.context() as patch:
            for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patch.setattr(Tensor, name, forbidden(name))
            with Watch() as watch:
                run(engine)
        self.logs.append(watch.log)
        cache = engine.buffers.cache
        held = [engine.state, engine.rules, engine.published, vars(engine.choose), cache.keys(), cache.values()]
        held += [engine.buffers.chain, engine.buffers.last_features, vars(engine.draft.workspace)]
        self.addresses.append([tensor.data_ptr() for tensor in tensors_in(held)])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    where = bundled_pair()
    model = AutoModelForCausalLM.from_pretrained(where.base, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(where.base)


def prompts(tokenizer: Any) -> dict[str, Tensor]:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, tokenize=False
        )
        for problem in load_problems("test")[:2]
    ]
    texts[1] = texts[1][-20:]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


TREES = {
    "plain": TreeConfig.none(),
    "chain": TreeConfig.chain(4),
    "tree": TreeConfig(nodes=20, depth=4, top_k=4),
}
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampling": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 1},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_step_never_waits_and_keeps_its_addresses(
    pair: tuple[Any, Any],
    tree: TreeConfig,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = pair
    decoder = SpecExitDecoder.from_pretrained(model, bundled_pair().draft, tokenizer=tokenizer, tree=tree, capacity=400)
    assert isinstance(decoder.exit, ExitConfig)
    assert decoder.exit.active
    inputs = prompts(tokenizer)
    new = 24 if tree.nodes > 1 else 8
    call = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "max_new_tokens": new, **options}
    expected = decoder.generate(**call)
    for op in OPS.values():
        monkeypatch.setattr(op, "cpu", op.twin)
    watcher = Watcher(monkeypatch)
    out = decoder.generate(**call)
    assert out.new_tokens == expected.new_tokens, "it is the real step that was watched"
    steps = max(stats.steps for stats in out.stats)
    assert len(watcher.logs) == steps > 4
    assert any(stats.trace is not None and stats.trace.positions for stats in out.stats), "the signals were not read"
    # One sequence of operations and shapes; the first step of a block also checks the model's arguments, which is none.
    for log in watcher.logs[1:]:
        assert log == watcher.logs[0]
    assert len(watcher.addresses[0]) > 40
    for addresses in watcher.addresses[1:]:
        assert addresses == watcher.addresses[0]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.tensor([1, 2]),
        lambda x: x.index_put((x > 0,), torch.zeros(())),
        lambda x: torch.equal(x, x),
        lambda x: x[: x.sum().long()],
        lambda x: torch.repeat_interleave(x.long()),
    ],
    ids=["item", "bool", "mask", "nonzero", "masked_select", "unique", "tensor", "put", "equal", "slice", "repeat"],
)
def test_the_watch_sees_what_waits(wait: Callable[[Tensor], object]) -> None:
    x = torch.ones(4)
    with pytest.raises(AssertionError, match="waits for the device"), torch.inference_mode(), Watch():
        wait(x)
