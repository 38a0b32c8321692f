"""Greedy text is `generate`'s own, token for token: every architecture, tree shape, batch and padding."""

from __future__ import annotations

import pytest
import torch
from oracle_draft import OracleDraft
from tiny_models import ARCHITECTURES, VOCAB, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config

from specexit import ExitConfig, SpecExitDecoder, TreeConfig

NEW = 24
TREES = {
    "plain": TreeConfig.none(),
    "chain": TreeConfig.chain(5),
    "12": TreeConfig(nodes=12, depth=4, top_k=3),
    "27": TreeConfig(nodes=27, depth=5, top_k=4),
    "60": TreeConfig(nodes=60, depth=7, top_k=10),
    "130": TreeConfig(nodes=130, depth=7, top_k=10),
}


def prompts(rng: torch.Generator, lengths: list[int]) -> list[torch.Tensor]:
    return [torch.randint(3, VOCAB, (n,), generator=rng) for n in lengths]


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


def greedy(model, rows: list[torch.Tensor]) -> list[list[int]]:
    ids, mask = pad(rows, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name: str, rng: torch.Generator) -> None:
    model = tiny_model(name)
    # 21 and 33 pass the window of 16; one token is the shortest prompt there is.
    for lengths in ([21], [5, 33, 1, 17, 9]):
        rows = prompts(rng, lengths)
        expected = greedy(model, rows)
        texts = [row.tolist() + new for row, new in zip(rows, expected, strict=True)]
        decoder = SpecExitDecoder(model, OracleDraft(texts), exit=ExitConfig.off())
        deepest = 0
        for label, tree in TREES.items():
            for side in ("left", "right") if len(rows) > 1 else ("left",):
                ids, mask = pad(rows, side)
                out = decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0, tree=tree)
                assert out.new_tokens == expected, (label, side)
                assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
                assert out.sequences[:, ids.shape[1] :].tolist() == expected
                for stats in out.stats:
                    assert sum(stats.accepted) == stats.new_tokens == NEW
                    assert stats.finish_reason == "length"
                    assert len(stats.accepted) == stats.steps
                    if tree.nodes == 1:
                        assert stats.steps == NEW
                deepest = max(deepest, *(max(stats.accepted) for stats in out.stats))
        assert deepest > 2, "no step accepted more than one draft token: acceptance was not exercised"


class TextOnly(OracleDraft):
    """As an n-gram drafter: it reads tokens and no features. What it is given is checked in `observe`."""

    feature_layers = ()


def test_a_draft_without_features(rng: torch.Generator) -> None:
    model = tiny_model("llama")
    rows = prompts(rng, [9, 4])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)
    draft = TextOnly([row.tolist() + tokens for row, tokens in zip(rows, new, strict=True)], hidden=0)
    decoder = SpecExitDecoder(model, draft, exit=ExitConfig.off(), tree=TREES["12"])
    assert decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0).new_tokens == new


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_to_the_end_of_a_table_of_positions(tree: TreeConfig, rng: torch.Generator) -> None:
    """Learned positions end where the text does: nodes that could not be emitted must not reach beyond."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=6, n_head=4, n_positions=11 + NEW)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    rows = prompts(rng, [11, 4])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)
    draft = OracleDraft([row.tolist() + tokens for row, tokens in zip(rows, new, strict=True)])
    decoder = SpecExitDecoder(model, draft, exit=ExitConfig.off(), tree=tree)
    assert decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0).new_tokens == new
