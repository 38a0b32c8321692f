"""The decoder on CUDA with the bundled pair, in float32: its text is `generate`'s, whatever the tree."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, MixtralConfig, MixtralForCausalLM

from specexit import ExitConfig, SpecExitDecoder, TreeConfig
from specexit.bundled import bundled_pair, load_problems
from specexit.engine import Engine
from specexit.loop import Loop

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


def kept(decoder: SpecExitDecoder) -> Engine:
    """The engine of the decoder's last call."""
    return decoder._pool.kept[-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_captured_step_decodes_the_same(tree, temperature, prompts):
    pair = bundled_pair()
    call = {**prompts, "max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": 1}
    outs = []
    for graph in (False, True):
        decoder = SpecExitDecoder.from_pretrained(
            pair.base, pair.draft, dtype=torch.float32, device=DEVICE, tree=tree, graph=graph
        )
        outs.append(decoder.generate(**call))
        assert kept(decoder).captured == graph
    assert outs[0].new_tokens == outs[1].new_tokens
    assert [row.exit_position for row in outs[0].stats] == [row.exit_position for row in outs[1].stats]


def test_the_next_call_replays_the_same_graph(decoder, prompts):
    call = {**prompts, "max_new_tokens": 40, "temperature": 0.0}
    first = decoder.generate(**call)
    engine, recording = kept(decoder), kept(decoder)._step.recording
    assert recording is not None
    again = decoder.generate(**call)
    assert kept(decoder) is engine
    assert engine._step.recording is recording
    assert again.new_tokens == first.new_tokens
    before = torch.cuda.memory_allocated()
    memory = decoder.memory()
    decoder.release()
    assert torch.cuda.memory_allocated() <= before - memory.cache - memory.drafts_cache
    assert decoder.memory().cache == decoder.memory().graph == 0


AFTER_A_FAILED_CAPTURE = """
import warnings
import torch
from specexit import SpecExitDecoder, bundled_pair

pair = bundled_pair()
decoder, other = (
    SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32, device="cuda") for _ in range(2)
)
call = {"input_ids": torch.tensor([[1, 5, 9, 7, 30]]), "max_new_tokens": 40, "temperature": 0.0}
expected = decoder.generate(**call).new_tokens
decoder.release()

def wait(module, args):
    if torch.cuda.is_current_stream_capturing():
        args[0].sum().item()

handle = other.model.model.norm.register_forward_pre_hook(wait)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert other.generate(**call).new_tokens == expected
assert any("not captured in a CUDA graph" in str(warning.message) for warning in caught)
assert not other._pool.kept[-1].captured
assert other._pool.record is None, "it is not tried again"
handle.remove()
other.release()
assert torch.randn(4, device="cuda").isfinite().all(), "a random generator is still in the capture"
torch.cuda.empty_cache()
other.model.generate(call["input_ids"].cuda(), max_new_tokens=4, do_sample=True)
assert decoder.generate(**call).new_tokens == expected
assert decoder._pool.kept[-1].captured
"""


def test_after_a_capture_that_fails():
    """What waits only while it is captured: it is decoded uncaptured, and the GPU can be used as before. In a process
    of its own, as everything after it would fail where that is not so."""
    done = subprocess.run([sys.executable, "-c", AFTER_A_FAILED_CAPTURE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_step_waits_or_allocates(decoder, prompts, monkeypatch):
    """Once it is captured; between steps the host reads pinned memory that events guard."""
    decoder.release()
    step, publish = Engine.step, Loop._publish
    sizes = set()

    def strictly(function: Callable[..., Any], owner: Any, engine: Engine) -> Any:
        if not engine.captured:
            return function(owner)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(owner)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            sizes.add(torch.cuda.memory_allocated())

    monkeypatch.setattr(Engine, "step", lambda engine: strictly(step, engine, engine))
    monkeypatch.setattr(Loop, "_publish", lambda loop: strictly(publish, loop, loop.engine))
    out = decoder.generate(**prompts, max_new_tokens=150, temperature=0.0, exit=ExitConfig.off())
    assert max(row.steps for row in out.stats) > 15
    assert len(sizes) == 1, "memory was allocated, or given back"


def test_the_mode_that_refuses_waiting_sees_it():
    x = torch.ones(3, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_join_a_captured_step(decoder, temperature):
    chats = [[{"role": "user", "content": problem.question}] for problem in load_problems()[:10]]
    rows = [
        decoder.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for chat in chats
    ]
    rows[3] = rows[3][-1:]
    options = {"max_new_tokens": 120, "temperature": temperature}
    seeds = list(range(10, 20))
    expected = [
        decoder.generate(torch.tensor([row]), seed=[seed], **options).new_tokens[0]
        for row, seed in zip(rows, seeds, strict=True)
    ]
    found = {c.index: c.new_tokens for c in decoder.generate_many(rows, slots=3, seed=seeds, **options)}
    assert [found[index] for index in range(10)] == expected


def test_the_cache_grows_and_the_step_is_captured_anew(decoder, prompts, monkeypatch):
    call = {**prompts, "max_new_tokens": 200, "temperature": 0.0, "exit": ExitConfig.off()}
    expected = decoder.generate(**call).new_tokens
    decoder.release()
    for module in ("engine", "pool"):
        monkeypatch.setattr(f"specexit.{module}.slot_bucket", lambda device: 64)
    assert decoder.generate(**call).new_tokens == expected
    assert kept(decoder).captured
    decoder.release()


def test_a_stream_of_the_callers(decoder, prompts):
    call = {**prompts, "max_new_tokens": 40, "temperature": 0.0}
    expected = decoder.generate(**call).new_tokens
    with torch.cuda.stream(torch.cuda.Stream()):
        made_here = {name: ids + 0 for name, ids in prompts.items()}
        assert decoder.generate(**{**call, **made_here}).new_tokens == expected


def test_out_of_memory_at_set_up_says_what_would_fit(prompts):
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(
        pair.base, pair.draft, dtype=torch.float32, device=DEVICE, capacity=200_000_000
    )
    with pytest.raises(torch.OutOfMemoryError, match=r"takes .*TB|takes .*GB.* were free; what would fit"):
        decoder.generate(**prompts, max_new_tokens=4)


def test_a_forward_that_waits_is_not_captured():
    config = MixtralConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).to(DEVICE).eval()
    model.set_experts_implementation("eager")
    with pytest.warns(UserWarning, match="not captured in a CUDA graph.*waits for the device"):
        decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    ids = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(decoder.generate(ids, max_new_tokens=12, temperature=0.0).sequences, expected)
    assert not kept(decoder).captured
