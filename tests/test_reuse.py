"""One decoder, many calls: other batches, trees and grad modes, errors in between, and odd inputs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from oracle_draft import OracleDraft
from test_lossless import pad, prompts
from tiny_models import VOCAB, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from specexit import ExitConfig, SpecExitDecoder, TreeConfig
from specexit.bundled import bundled_pair

NEW = 10
TREES = [TreeConfig(nodes=16, depth=4, top_k=3), TreeConfig.none(), TreeConfig.chain(3), TreeConfig(nodes=70, depth=5)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def bundled() -> SpecExitDecoder:
    """A real draft, which has a cache of its own to get wrong."""
    pair = bundled_pair()
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)  # exact where greedy text must be
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    return SpecExitDecoder.from_pretrained(model, pair.draft, tokenizer=tokenizer, exit=ExitConfig.off())


class Raising(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("criterion failed")


def test_batches_trees_and_errors_in_turn(bundled: SpecExitDecoder, rng: torch.Generator) -> None:
    for lengths, tree in zip(([6], [9, 1, 14], [3, 3], [1]), TREES, strict=True):
        rows = [row % bundled.tokenizer.vocab_size for row in prompts(rng, lengths)]
        ids, mask = pad(rows, "left")
        expected = bundled.model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=VOCAB
        )[:, ids.shape[1] :].tolist()
        options = {"max_new_tokens": NEW, "temperature": 0.0, "eos_token_id": VOCAB}
        for _ in range(2):
            assert bundled.generate(ids, mask, tree=tree, **options).new_tokens == expected
        with pytest.raises(RuntimeError, match="criterion failed"):
            bundled.generate(ids, mask, tree=tree, stopping_criteria=StoppingCriteriaList([Raising()]), **options)
        # The prompts come back in any order, with the same text.
        out = bundled.generate(ids.flip(0), mask.flip(0), tree=TREES[0], **options)
        assert out.new_tokens == expected[::-1]


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(model: PreTrainedModel, mode: type, rng: torch.Generator) -> None:
    rows = prompts(rng, [6, 4])
    with mode():
        ids, mask = pad([row.clone() for row in rows], "left")
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        texts = [row[keep:].tolist() for row, keep in zip(expected, (0, 2), strict=True)]
        decoder = SpecExitDecoder(model, OracleDraft(texts), exit=ExitConfig.off(), tree=TREES[0])
        out = decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0)
        assert torch.equal(out.sequences, expected)
        assert out.sequences.is_inference() == torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled() == (mode in (nullcontext, torch.enable_grad))


def test_model_can_be_trained_afterwards(rng: torch.Generator) -> None:
    model = tiny_model("llama")
    ids = prompts(rng, [8])[0][None]
    SpecExitDecoder(model, exit=ExitConfig.off()).generate(ids, max_new_tokens=3, temperature=0.0)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integer_inputs(model: PreTrainedModel, dtype: torch.dtype, rng: torch.Generator) -> None:
    ids, mask = pad(prompts(rng, [6, 4]), "left")
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    expected = decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0).sequences
    for narrow in (mask, mask.bool(), mask.float(), mask.to(dtype)):
        out = decoder.generate(ids.to(dtype), narrow, max_new_tokens=NEW, temperature=0.0)
        assert torch.equal(out.sequences, expected)
        assert out.sequences.dtype == torch.int64


def test_strided_inputs_are_read_and_left_alone(model: PreTrainedModel, rng: torch.Generator) -> None:
    wide = torch.randint(3, VOCAB, (4, 12), generator=rng)
    ids, before = wide[::2, ::2], wide.clone()
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    out = decoder.generate(ids, max_new_tokens=NEW, temperature=0.0)
    assert torch.equal(out.sequences, model.generate(ids.contiguous(), max_new_tokens=NEW, do_sample=False))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("width", [0, 5])
def test_no_prompts(model: PreTrainedModel, width: int) -> None:
    ids = torch.zeros(0, width, dtype=torch.long)
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    out = decoder.generate(ids, max_new_tokens=NEW)
    assert (out.new_tokens, out.stats, out.sequences.shape) == ([], [], (0, width))
    if width:
        assert model.generate(ids, max_new_tokens=NEW, custom_generate=decoder).shape == (0, width)


def test_duplicated_prompts_have_one_text(model: PreTrainedModel, rng: torch.Generator) -> None:
    row = prompts(rng, [6])[0]
    text = model.generate(row[None], max_new_tokens=NEW, do_sample=False)[0].tolist()
    decoder = SpecExitDecoder(model, OracleDraft([text] * 5, accuracy=0.5), exit=ExitConfig.off(), tree=TREES[0])
    out = decoder.generate(row.expand(5, -1), max_new_tokens=NEW, temperature=0.0)
    assert out.sequences.tolist() == [text] * 5


def test_seeds_are_drawn_from_torchs_generator(model: PreTrainedModel, rng: torch.Generator) -> None:
    ids = prompts(rng, [6])[0][None]
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with torch.random.fork_rng():
        texts = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            texts.append([decoder.generate(ids, max_new_tokens=NEW, temperature=1.0).new_tokens for _ in range(2)])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_prompts_longer_than_a_chunk(model: PreTrainedModel, rng: torch.Generator, monkeypatch: object) -> None:
    monkeypatch.setattr("specexit.prefill.CHUNK", 8)
    rows = prompts(rng, [25, 8, 9, 17, 2])
    ids, mask = pad(rows, "left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    new = expected[:, ids.shape[1] :].tolist()
    texts = [row.tolist() + text for row, text in zip(rows, new, strict=True)]
    decoder = SpecExitDecoder(model, OracleDraft(texts), exit=ExitConfig.off(), tree=TREES[0])
    assert decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0).new_tokens == new
