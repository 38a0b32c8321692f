"""The bundled pair on its own test problems: the text is `generate`'s, and the exit keeps what it promises."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair, load_problems
from specexit.bundled import Problem

TREES = {"plain": TreeConfig.none(), "chain": TreeConfig.chain(8), "60": TreeConfig(nodes=60, depth=7, top_k=10)}


@pytest.fixture(scope="module")
def decoder() -> SpecExitDecoder:
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, dtype=torch.float32)
    assert decoder.tokenizer is not None
    decoder.tokenizer.padding_side = "left"
    return decoder


def encode(decoder: SpecExitDecoder, problems: list[Problem]) -> dict[str, torch.Tensor]:
    assert decoder.tokenizer is not None
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    inputs = decoder.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def check(decoder: SpecExitDecoder, problems: list[Problem], trees: dict[str, TreeConfig]) -> None:
    """The greedy text of every tree, and with an exit the same cut for all of them."""
    inputs = encode(decoder, problems)
    model = AutoModelForCausalLM.from_pretrained(bundled_pair().base, dtype=torch.float32).eval()
    width = inputs["input_ids"].shape[1]
    end = int(model.generation_config.eos_token_id)
    expected = [row[: row.index(end) + 1] for row in model.generate(**inputs, do_sample=False)[:, width:].tolist()]
    cuts = set()
    for label, tree in trees.items():
        out = decoder.generate(**inputs, exit=ExitConfig.off(), tree=tree)
        assert out.new_tokens == expected, label
        cut = decoder.generate(**inputs, tree=tree)
        cuts.add(tuple((stats.exit_position, stats.thinking_tokens) for stats in cut.stats))
        for problem, tokens in zip(problems, cut.new_tokens, strict=True):
            assert decoder.tokenizer is not None
            assert f"The answer is {problem.answer}." in decoder.tokenizer.decode(tokens)
    assert len(cuts) == 1, "the exit depends on the tree"
    assert all(position is not None for position, _ in cuts.pop())


def test_a_few_problems(decoder: SpecExitDecoder, rng: torch.Generator) -> None:
    problems = load_problems("test")
    chosen = torch.randperm(len(problems), generator=rng)[:3].tolist()
    check(decoder, [problems[index] for index in chosen], {"chain": TREES["chain"], "60": TREES["60"]})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_problems(decoder: SpecExitDecoder) -> None:
    problems = load_problems("test")
    for first in range(0, len(problems), 25):
        check(decoder, problems[first : first + 25], TREES)
