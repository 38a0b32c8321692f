"""Early exit through the whole decoder: where it happens depends on the text alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_draft import OracleDraft
from test_lossless import TREES, pad, prompts
from tiny_models import VOCAB, tiny_model
from transformers import PreTrainedModel

from specexit import ExitConfig, GenerateOutput, SpecExitDecoder, TreeConfig

NEW = 40


def signals(position: int, following: int) -> list[float]:
    """Raw signals of a position, a function of the text as the draft reads it; from about position 30 on they pass."""
    wave = ((position * 37 + following * 11) % 17) / 17
    return [position / 8 + wave - 3, position / 8 - wave - 2, 6 - position / 6 + wave]


def greedy_texts(model: PreTrainedModel, rows: list[torch.Tensor]) -> list[list[int]]:
    ids, mask = pad(rows, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return [row.tolist() + new for row, new in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True)]


def unused(texts: list[list[int]], count: int) -> tuple[int, ...]:
    """Ids that stand in no text: the model does not end its thinking by itself."""
    return tuple([token for token in range(3, VOCAB) if all(token not in text for text in texts)][:count])


def config(texts: list[list[int]], end: int = 1, **options: Any) -> ExitConfig:
    """Thresholds that pass late in the texts; what stands around there ends a paragraph. `end` ids end the thinking."""
    settings = {"confidence": 0.6, "progress": 0.5, "remaining": 30.0, "alpha": 0.4, **options}
    boundaries = {text[32 + 2 * row] for row, text in enumerate(texts)}
    return ExitConfig(
        boundary_ids=sorted(boundaries), start_ids=(), end_ids=unused(texts, end), assume_thinking=True, **settings
    )


def decode(
    model: PreTrainedModel,
    rows: list[torch.Tensor],
    texts: list[list[int]],
    exit: ExitConfig,
    tree: TreeConfig,
    **options: Any,
) -> GenerateOutput:
    ids, mask = pad(rows, "left")
    decoder = SpecExitDecoder(model, OracleDraft(texts, signals=signals), exit=exit)
    return decoder.generate(ids, mask, tree=tree, **{"max_new_tokens": NEW, "temperature": 0.0, **options})


@pytest.mark.parametrize("n_end", [1, 2], ids=["one-id", "two-ids"])
def test_exit_position_is_the_same_for_every_tree_and_batch(n_end: int, rng: torch.Generator) -> None:
    model = tiny_model("llama")
    rows = prompts(rng, [6, 11, 4, 17, 9])
    texts = greedy_texts(model, rows)
    exit = config(texts, n_end)
    end = tuple(exit.end_ids or ())
    first = None
    for label, tree in TREES.items():
        out = decode(model, rows, texts, exit, tree)
        found = [(s.exit_position, s.exit_reason, s.thinking_tokens) for s in out.stats]
        if first is None:
            first = (found, out.new_tokens)
            assert sum(position is not None for position, *_ in found) >= 3, "too few exits to mean anything"
        assert (found, out.new_tokens) == first, label
        for row, text, new, stats in zip(rows, texts, out.new_tokens, out.stats, strict=True):
            if stats.exit_position is None:
                assert new == text[len(row) :]
                continue
            kept = stats.exit_position + 1 - len(row)
            assert new[:kept] == text[len(row) : stats.exit_position + 1], "thinking is the base's own up to the cut"
            assert new[kept - 1] in exit.boundary_ids
            assert tuple(new[kept : kept + len(end)]) == end
            # What follows is the base's own continuation of the cut text.
            prefix = torch.tensor([row.tolist() + new[: kept + len(end)]])
            rest = NEW - kept - len(end)
            if rest > 0:
                mask = torch.ones_like(prefix)  # without it, generate takes an id that is the pad's for padding
                after = model.generate(prefix, attention_mask=mask, max_new_tokens=rest, do_sample=False)
                after = after[0, prefix.shape[1] :].tolist()
                assert new[kept + len(end) :] == after
    for index, row in enumerate(rows):
        for label in ("plain", "chain", "12"):
            out = decode(model, [row], texts[index : index + 1], exit, TREES[label])
            found = [(s.exit_position, s.exit_reason, s.thinking_tokens) for s in out.stats]
            assert (found, out.new_tokens) == ([first[0][index]], [first[1][index]]), label


def test_end_of_sequence_after_the_cut_is_undone(rng: torch.Generator) -> None:
    """A stop id accepted in the same step as the cut, behind it, does not end the row."""
    model = tiny_model("llama")
    sampled = {"temperature": 1.0, "seed": 3}  # greedy text soon repeats itself
    for _ in range(100):
        rows = prompts(rng, [8])
        plain = SpecExitDecoder(model).generate(rows[0].unsqueeze(0), max_new_tokens=NEW, **sampled)
        texts = [rows[0].tolist() + plain.new_tokens[0]]
        exit = config(texts)
        reference = decode(model, rows, texts, exit, TREES["plain"], **sampled)
        position = reference.stats[0].exit_position
        # The stop id is the token that the cut drops; it must not stand earlier in the text.
        if position is not None and (stop := texts[0][position + 1]) not in texts[0][8 : position + 1]:
            break
    else:
        pytest.fail("no text with an exit before a token that is new in it")
    for label, tree in TREES.items():
        out = decode(model, rows, texts, exit, tree, eos_token_id=stop, **sampled)
        assert out.stats[0].exit_position == position, label
        assert out.new_tokens[0][: position + 2 - 8] == [*texts[0][8 : position + 1], *exit.end_ids]


def test_exit_at_the_last_allowed_token_is_a_length_stop(rng: torch.Generator) -> None:
    model = tiny_model("llama")
    rows = prompts(rng, [8])
    texts = greedy_texts(model, rows)
    exit = config(texts)
    position = decode(model, rows, texts, exit, TREES["plain"]).stats[0].exit_position
    assert position is not None
    new = position + 1 - 8
    for label, tree in TREES.items():
        out = decode(model, rows, texts, exit, tree, max_new_tokens=new)
        assert out.stats[0].finish_reason == "length", label
        assert out.stats[0].exit_position is None
        assert out.new_tokens[0] == texts[0][8 : position + 1]
        out = decode(model, rows, texts, exit, tree, max_new_tokens=new + 1)
        assert out.stats[0].exit_position == position
        assert out.new_tokens[0] == [*texts[0][8 : position + 1], *exit.end_ids]


def test_nan_signals_never_exit(rng: torch.Generator) -> None:
    model = tiny_model("llama")
    rows = prompts(rng, [8, 3])
    texts = greedy_texts(model, rows)
    draft = OracleDraft(texts, signals=lambda position, token: [float("nan")] * 3)
    decoder = SpecExitDecoder(model, draft, exit=config(texts))
    ids, mask = pad(rows, "left")
    out = decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0, tree=TREES["12"])
    assert out.new_tokens == [text[len(row) :] for row, text in zip(rows, texts, strict=True)]
    assert all(stats.exit_position is None for stats in out.stats)


class OnlyRemaining(OracleDraft):
    """The last signal alone: its column is there, the two before it are NaN."""

    def select_source(self, source: str | None) -> None:
        self.signals = () if source is None else ("remaining",)

    def observe(self, *args: torch.Tensor) -> torch.Tensor:
        raw = super().observe(*args)
        raw[..., :2] = float("nan")
        return raw


def test_a_draft_with_the_last_signal_alone(rng: torch.Generator) -> None:
    model = tiny_model("llama")
    rows = prompts(rng, [8, 5])
    texts = greedy_texts(model, rows)
    exit = config(texts, confidence=None, progress=None)
    expected = decode(model, rows, texts, exit, TREES["12"])
    decoder = SpecExitDecoder(model, OnlyRemaining(texts, signals=signals), exit=exit)
    ids, mask = pad(rows, "left")
    options = {"max_new_tokens": NEW, "temperature": 0.0, "tree": TREES["12"]}
    out = decoder.generate(ids, mask, **options)
    assert out.new_tokens == expected.new_tokens
    assert [s.exit_position for s in out.stats] == [s.exit_position for s in expected.stats] != [None, None]
    with pytest.raises(ValueError, match=r"confidence must be None: .* the draft gives remaining"):
        decoder.generate(ids, mask, exit=config(texts, progress=None), **options)


@pytest.mark.parametrize("hard", [False, True])
def test_a_budget_needs_no_draft(hard: bool, rng: torch.Generator) -> None:
    model = tiny_model("llama")
    rows = prompts(rng, [8])
    text = greedy_texts(model, rows)[0]
    budget = 6
    exit = config([text], enabled=False, thinking_budget=budget, hard_budget=hard)
    out = SpecExitDecoder(model, exit=exit).generate(rows[0][None], max_new_tokens=NEW, temperature=0.0)
    expected = next(p for p in range(8 + budget - 1, 8 + NEW) if hard or text[p] in exit.boundary_ids)
    assert out.new_tokens[0][: expected + 2 - 8] == [*text[8 : expected + 1], *exit.end_ids]
    assert out.stats[0].exit_position == expected
    assert out.stats[0].exit_reason == "budget"
    assert out.stats[0].thinking_tokens == expected + 1 - 8
