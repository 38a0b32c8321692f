"""Logits processors under speculation: generate's own text, and the very calls that plain decoding would make."""

from __future__ import annotations

import pytest
import torch
from oracle_draft import OracleDraft
from test_lossless import pad, prompts
from tiny_models import VOCAB, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specexit import ExitConfig, SpecExitDecoder, TreeConfig
from specexit.processors import split_warpers

NEW = 16
TREES = {
    "plain": TreeConfig.none(),
    "chain": TreeConfig.chain(4),
    "tree": TreeConfig(nodes=16, depth=4, top_k=3),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


class Recorder(LogitsProcessor):
    """Keeps the prefixes it is asked with, and changes nothing."""

    def __init__(self) -> None:
        self.prefixes: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.dtype == torch.int64
        assert scores.dtype == torch.float32
        assert scores.shape == (input_ids.shape[0], VOCAB)
        self.prefixes.extend(input_ids.tolist())
        return scores


class Spoiler(LogitsProcessor):
    """Works in place and depends on the whole prefix; plain decoding allows that."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[torch.arange(len(scores)), input_ids.sum(1) % VOCAB] += 5
        scores[:, input_ids.shape[1]] = -float("inf")
        return scores


def oracle(rows: list[torch.Tensor], new: list[list[int]]) -> OracleDraft:
    return OracleDraft([row.tolist() + text for row, text in zip(rows, new, strict=True)], accuracy=0.9)


OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "suppress_tokens": {"suppress_tokens": list(range(3, VOCAB, 3))},
    "bad_words_ids": {"bad_words_ids": [[5], [7, 9], *([n] for n in range(20, VOCAB, 4))]},
    "sequence_bias": {"sequence_bias": [[[n], 2.0] for n in range(11, 30)]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 2},
    "custom": {"logits_processor": LogitsProcessorList([Spoiler()])},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [4, 8]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_text_equals_generate(model: PreTrainedModel, options: dict[str, object], rng: torch.Generator) -> None:
    deepest = 0
    for lengths in ([6], [4, 11, 1]):
        rows = prompts(rng, lengths)
        ids, mask = pad(rows, "left")
        expected = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
        decoder = SpecExitDecoder(model, oracle(rows, expected[:, ids.shape[1] :].tolist()), exit=ExitConfig.off())
        for label, tree in TREES.items():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=False,
                custom_generate=decoder,
                tree=tree,
                return_dict_in_generate=True,
                **options,
            )
            assert torch.equal(out.sequences, expected), label
            deepest = max(deepest, *(max(stats.accepted) for stats in out.stats))
    assert deepest > 2, "no step accepted more than one draft token"


def test_min_new_tokens(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [6, 9])
    ids, mask = pad(rows, "left")
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    free = model.generate(ids, **options)[:, ids.shape[1] :].tolist()
    options.update(eos_token_id=[free[0][1], free[1][3]], min_new_tokens=7)
    expected = model.generate(ids, **options)
    assert expected.shape[1] >= ids.shape[1] + 7
    decoder = SpecExitDecoder(model, oracle(rows, free), exit=ExitConfig.off())
    for label, tree in TREES.items():
        assert torch.equal(model.generate(ids, custom_generate=decoder, tree=tree, **options), expected), label


@pytest.mark.parametrize("lengths", [[5], [4, 9, 1]], ids=["one", "batch"])
def test_prefixes_are_those_of_plain_decoding(model: PreTrainedModel, lengths: list[int], rng: torch.Generator) -> None:
    rows = prompts(rng, lengths)
    ids, mask = pad(rows, "left")
    plain = Recorder()
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([plain]), **options)
    wanted = [plain.prefixes[row :: len(rows)] for row in range(len(rows))]
    new = expected[:, ids.shape[1] :].tolist()
    for label, tree in TREES.items():
        seen = Recorder()
        out = SpecExitDecoder(model, oracle(rows, new), exit=ExitConfig.off(), tree=tree).generate(
            ids, mask, max_new_tokens=NEW, temperature=0.0, logits_processor=LogitsProcessorList([seen])
        )
        assert out.new_tokens == new, label
        # Every call is one that plain decoding makes, made once, and in order: none for a token that is not kept.
        calls = {row: [p for p in seen.prefixes if p[: ids.shape[1]] == ids[row].tolist()] for row in range(len(rows))}
        assert [calls[row] for row in range(len(rows))] == wanted, label
        assert len(seen.prefixes) == sum(stats.new_tokens for stats in out.stats)
        assert all(max(stats.accepted) <= tree.max_depth + 1 for stats in out.stats)


def test_no_call_past_a_stop_or_a_limit(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [6])
    new = model.generate(rows[0][None], max_new_tokens=NEW, do_sample=False)[0, 6:].tolist()
    stop = new[9]
    for limit, eos in ((NEW, stop), (5, None)):
        kept = min(limit, new.index(stop) + 1 if eos is not None else NEW)
        for tree in TREES.values():
            seen = Recorder()
            out = SpecExitDecoder(model, oracle(rows, [new]), exit=ExitConfig.off(), tree=tree).generate(
                rows[0][None],
                max_new_tokens=limit,
                temperature=0.0,
                eos_token_id=eos,
                logits_processor=LogitsProcessorList([seen]),
            )
            assert out.new_tokens == [new[:kept]]
            assert [len(prefix) - 6 for prefix in seen.prefixes] == list(range(kept))


def test_sampled_text_does_not_depend_on_the_tree(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [4, 11])
    ids, mask = pad(rows, "left")
    options = {
        "max_new_tokens": NEW,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.95,
        "seed": [5, 6],
        "logits_processor": LogitsProcessorList([Spoiler()]),
    }
    expected = SpecExitDecoder(model, exit=ExitConfig.off()).generate(ids, mask, tree=TreeConfig.none(), **options)
    decoder = SpecExitDecoder(model, oracle(rows, expected.new_tokens), exit=ExitConfig.off())
    for label, tree in TREES.items():
        assert decoder.generate(ids, mask, tree=tree, **options).new_tokens == expected.new_tokens, label


def test_a_processor_that_changes_nothing_leaves_the_sample(model: PreTrainedModel, rng: torch.Generator) -> None:
    """The host draws with the noise of the device's sampler."""
    ids = prompts(rng, [7])[0][None]
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    options = {"max_new_tokens": NEW, "temperature": 1.1, "top_p": 0.9, "seed": 4}
    with_one = decoder.generate(ids, logits_processor=LogitsProcessorList([Recorder()]), **options)
    assert with_one.new_tokens == decoder.generate(ids, **options).new_tokens


def test_warpers_become_parameters_only_at_the_end_and_in_order() -> None:
    temperature, top_k, top_p, min_p = (
        TemperatureLogitsWarper(0.5),
        TopKLogitsWarper(7),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.1),
    )
    recorder = Recorder()
    sampling, rest = split_warpers([recorder, temperature, top_k, top_p, min_p], True)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.9, 0.1)
    assert rest == [recorder]
    sampling, rest = split_warpers([top_k, temperature, top_p], True)  # top-k before temperature is another filter
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, None, 0.9)
    assert rest == [top_k]
    sampling, rest = split_warpers([temperature, top_k, recorder], True)
    assert (sampling.temperature, sampling.top_k) == (1.0, None)
    assert rest == [temperature, top_k, recorder]
    several = TopPLogitsWarper(0.9, min_tokens_to_keep=3)
    assert split_warpers([temperature, several], True)[1] == [temperature, several]
    finite = TopKLogitsWarper(7, filter_value=-4.0)
    assert split_warpers([finite, top_p], True)[1] == [finite]
    sampling, rest = split_warpers([temperature, top_k], False)  # greedy generate would run them too
    assert (sampling.temperature, rest) == (0.0, [temperature, top_k])


def test_warpers_in_an_odd_order_are_run_in_it(model: PreTrainedModel, rng: torch.Generator) -> None:
    """top-k 2 of the flattened logits, then a high temperature: only two tokens are ever drawn at a position."""
    ids = prompts(rng, [6])[0].expand(40, -1)
    odd = LogitsProcessorList([TopKLogitsWarper(2), TemperatureLogitsWarper(50.0)])
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    out = decoder.generate(ids, max_new_tokens=1, temperature=1.0, top_k=0, seed=1, logits_processor=odd)
    best = model(ids[:1]).logits[0, -1].topk(2).indices.tolist()
    assert {row[0] for row in out.new_tokens} == set(best)


def test_forced_ids_are_not_asked_for(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [5])
    new = model.generate(rows[0][None], max_new_tokens=NEW, do_sample=False)[0, 5:].tolist()
    end = next(token for token in range(3, VOCAB) if token not in new)
    force = (end, 17, 21, 23, end, 19)  # longer than a step
    text = rows[0].tolist() + new[:4] + list(force)
    after = model.generate(torch.tensor([text]), max_new_tokens=NEW - 10, do_sample=False)[0, len(text) :].tolist()
    budget = ExitConfig(
        enabled=False,
        thinking_budget=4,
        hard_budget=True,
        start_ids=(next(token for token in range(3, VOCAB) if token not in text + new + after),),
        end_ids=(end,),
        force_ids=force,
        boundary_ids=(5,),
        assume_thinking=True,
    )
    for label, tree in TREES.items():
        seen = Recorder()
        decoder = SpecExitDecoder(model, oracle(rows, [new]), exit=budget, tree=tree)
        out = decoder.generate(
            rows[0][None], max_new_tokens=NEW, temperature=0.0, logits_processor=LogitsProcessorList([seen])
        )
        assert out.new_tokens == [new[:4] + list(force) + after], label
        lengths = [len(prefix) - 5 for prefix in seen.prefixes]
        # The cut may come after the base has chosen past it; none of the forced tokens after the first is asked for.
        assert not set(lengths) & set(range(5 + tree.max_depth, 4 + len(force))), label
        after_cut = [prefix for prefix in seen.prefixes if prefix[5 + 4 : 5 + 10] == list(force)]
        assert [len(prefix) - 5 for prefix in after_cut] == list(range(10, NEW)), label
        assert all(
            prefix == (text + after)[: len(prefix)] or prefix == (rows[0].tolist() + new)[: len(prefix)]
            for prefix in seen.prefixes
        ), label


def test_classifier_free_guidance(model: PreTrainedModel, rng: torch.Generator) -> None:
    """A processor that runs the model itself, in the middle of our step, and keeps a cache of its own."""
    rows = prompts(rng, [8])
    options = {"max_new_tokens": NEW, "do_sample": False, "guidance_scale": 1.5}
    expected = model.generate(rows[0][None], **options)
    decoder = SpecExitDecoder(model, oracle(rows, [expected[0, 8:].tolist()]), exit=ExitConfig.off())
    for label, tree in TREES.items():
        out = model.generate(rows[0][None], custom_generate=decoder, tree=tree, **options)
        assert torch.equal(out, expected), label


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"encoder_repetition_penalty": 1.5}, "EncoderRepetitionPenaltyLogitsProcessor"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [row + 3]}, "PrefixConstrainedLogitsProcessor"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    ],
    ids=["encoder", "prefix", "guidance"],
)
def test_processors_of_whole_batches_are_refused(model: PreTrainedModel, options: dict[str, object], name: str) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    ids = torch.tensor([[3, 4], [5, 6]])
    with pytest.raises(ValueError, match=f"logits_processor must not hold a {name} for several prompts"):
        model.generate(ids, max_new_tokens=2, custom_generate=decoder, **options)
    one = model.generate(ids[:1], max_new_tokens=2, **options)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=2, custom_generate=decoder, **options), one)


def test_a_processor_that_raises_leaves_a_usable_decoder(model: PreTrainedModel, rng: torch.Generator) -> None:
    class Raising(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 8:
                raise RuntimeError("processor failed")
            return scores

    ids = prompts(rng, [6])[0][None]
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with pytest.raises(RuntimeError, match="processor failed"):
        decoder.generate(ids, max_new_tokens=NEW, logits_processor=LogitsProcessorList([Raising()]))
    assert torch.equal(decoder.generate(ids, max_new_tokens=NEW).sequences, expected)
