"""The decoder on CUDA with the bundled pair, in float32: its text is `generate`'s, whatever the tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, loop
from specexit.bundled import bundled_pair, load_problems

DEVICE = "cuda"
PROBLEMS = 4
NEW_TOKENS = 300  # an exit takes about 175
TREES = {"none": TreeConfig.none(), "chain": TreeConfig.chain(5), "tree": TreeConfig(nodes=60, depth=7, top_k=10)}


@pytest.fixture(scope="module")
def decoder() -> SpecExitDecoder:
    pair = bundled_pair()
    return SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32, device=DEVICE)


@pytest.fixture(scope="module")
def prompts(decoder) -> BatchEncoding:
    chats = [[{"role": "user", "content": problem.question}] for problem in load_problems()[:PROBLEMS]]
    decoder.tokenizer.padding_side = "left"
    return decoder.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(DEVICE)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_greedy_text_is_generates(decoder, prompts, tree):
    expected = decoder.model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
    out = decoder.generate(
        prompts["input_ids"],
        prompts["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        temperature=0.0,
        exit=ExitConfig.off(),
        tree=tree,
    )
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_and_exits_do_not_depend_on_the_tree(decoder, prompts, temperature):
    outs = [
        decoder.generate(
            prompts["input_ids"],
            prompts["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            temperature=temperature,
            seed=1,
            tree=tree,
        )
        for tree in TREES.values()
    ]
    exits = [[row.exit_position for row in out.stats] for out in outs]
    assert outs[0].new_tokens == outs[1].new_tokens == outs[2].new_tokens
    assert exits[0] == exits[1] == exits[2]
    assert any(position is not None for position in exits[0])


def test_ids_may_be_on_the_host(decoder, prompts):
    options = {"max_new_tokens": 20, "temperature": 0.0, "exit": ExitConfig.off()}
    expected = decoder.generate(prompts["input_ids"], prompts["attention_mask"], **options)
    out = decoder.generate(prompts["input_ids"].cpu(), prompts["attention_mask"].cpu(), **options)
    assert out.new_tokens == expected.new_tokens
    assert out.sequences.tolist() == expected.sequences.tolist()


class Captured:
    """Stands in for `decode_step`: two steps, and from the third on replays of a CUDA graph of it."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *args: Any) -> None:
        self.steps += 1
        if self.steps < 3:
            self.step(*args)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step(*args)
        self.graph.replay()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_step_is_one_cuda_graph(tree, temperature, prompts, monkeypatch):
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(
        pair.base, pair.draft, dtype=torch.float32, device=DEVICE, tree=tree, capacity=512
    )
    call = {**prompts, "max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": 1}
    expected = decoder.generate(**call)
    captured = Captured(loop.decode_step)
    monkeypatch.setattr(loop, "decode_step", captured)
    out = decoder.generate(**call)
    assert captured.graph is not None
    assert captured.steps > 10
    assert out.new_tokens == expected.new_tokens
    assert [row.exit_position for row in out.stats] == [row.exit_position for row in expected.stats]
