"""How a row ends: stop ids, limits, criteria, capacity; and the streamer that sees it happen."""

from __future__ import annotations

import threading
import time

import pytest
import tokenizers
import torch
from oracle_draft import OracleDraft
from test_lossless import pad, prompts
from tiny_models import VOCAB, tiny_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MaxTimeCriteria,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
)

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, engine, pool
from specexit.bundled import bundled_pair

NEW = 16
TREES = {
    "plain": TreeConfig.none(),
    "chain": TreeConfig.chain(5),
    "tree": TreeConfig(nodes=16, depth=4, top_k=3),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def greedy(model: PreTrainedModel, rows: list[torch.Tensor], new: int = NEW) -> list[list[int]]:
    ids, mask = pad(rows, "left")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return out[:, ids.shape[1] :].tolist()


def decoder_for(
    model: PreTrainedModel, rows: list[torch.Tensor], new: list[list[int]], accuracy: float = 1.0, **options: object
) -> SpecExitDecoder:
    texts = [row.tolist() + text for row, text in zip(rows, new, strict=True)]
    draft = OracleDraft(texts, hidden=model.config.hidden_size, accuracy=accuracy)
    return SpecExitDecoder(model, draft, exit=ExitConfig.off(), **options)


def until(text: list[int], stops: list[int]) -> list[int]:
    """The text up to its first stop id, which is kept."""
    ends = [index for index, token in enumerate(text) if token in stops]
    return text[: ends[0] + 1] if ends else text


class After(StoppingCriteria):
    """Stops at a number of tokens, padding included, and counts how it was asked."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        assert scores is None
        self.seen.extend(input_ids.tolist())
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, dtype=torch.bool)


class Recorder:
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[list[int] | str] = []

    def put(self, value: torch.Tensor) -> None:
        assert "end" not in self.calls
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_stop_ids(model: PreTrainedModel, tree: TreeConfig, rng: torch.Generator) -> None:
    rows = prompts(rng, [6, 3, 9])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)
    decoder = decoder_for(model, rows, new, tree=tree)
    firsts = [text[0] for text in new]
    for stops in (new[0][6], [new[0][2]], [new[0][7], new[1][3], new[2][5]], firsts, [VOCAB + 7]):
        listed = [stops] if isinstance(stops, int) else stops
        out = decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0, eos_token_id=stops)
        assert out.new_tokens == [until(text, listed) for text in new]
        for text, stats in zip(out.new_tokens, out.stats, strict=True):
            assert stats.finish_reason == ("stop" if text[-1] in listed else "length")
            assert stats.new_tokens == len(text) == sum(stats.accepted)
        width = max(map(len, out.new_tokens))
        assert out.sequences.shape == (3, ids.shape[1] + width)
        for row, text in zip(out.sequences[:, ids.shape[1] :].tolist(), out.new_tokens, strict=True):
            assert row == text + [0] * (width - len(text))


def test_stop_id_inside_an_accepted_path(model: PreTrainedModel, rng: torch.Generator) -> None:
    """The draft is right about the tokens after the stop id too; they are dropped."""
    rows = prompts(rng, [6])
    new = greedy(model, rows)
    for at in range(6):
        out = decoder_for(model, rows, new, tree=TreeConfig.chain(6)).generate(
            rows[0][None], max_new_tokens=NEW, temperature=0.0, eos_token_id=new[0][at]
        )
        assert out.new_tokens == [until(new[0], [new[0][at]])]
        assert out.stats[0].steps == 1


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_max_new_tokens(model: PreTrainedModel, tree: TreeConfig, count: int, rng: torch.Generator) -> None:
    rows = prompts(rng, [6, 1])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)
    out = decoder_for(model, rows, new, tree=tree).generate(ids, mask, max_new_tokens=count, temperature=0.0)
    assert out.new_tokens == [text[:count] for text in new]
    assert [stats.finish_reason for stats in out.stats] == ["length"] * 2
    # The last token allowed is a stop id: it stopped.
    out = decoder_for(model, rows[:1], new[:1], tree=tree).generate(
        rows[0][None], max_new_tokens=count, temperature=0.0, eos_token_id=new[0][count - 1]
    )
    assert out.stats[0].finish_reason == "stop"


@pytest.mark.parametrize("count", [0, -3])
def test_bad_max_new_tokens(model: PreTrainedModel, count: int) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with pytest.raises(ValueError, match=f"max_new_tokens must be at least 1, was {count}"):
        decoder.generate(torch.tensor([[3]]), max_new_tokens=count)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_criterion_is_asked_after_every_token(model: PreTrainedModel, tree: TreeConfig, rng: torch.Generator) -> None:
    rows = prompts(rng, [6, 2])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)
    criterion = After(6 + 7)
    out = decoder_for(model, rows, new, tree=tree).generate(
        ids, mask, max_new_tokens=NEW, temperature=0.0, stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert out.new_tokens == [text[:7] for text in new]
    for stats in out.stats:
        assert (stats.finish_reason, stats.new_tokens, sum(stats.accepted)) == ("criteria", 7, 7)
    for row in range(2):
        asked = [seen[6:] for seen in criterion.seen if seen[:6] == ids[row].tolist()]
        assert asked == [new[row][: n + 1] for n in range(7)], "once for every token, in order, padding included"


def test_a_criterion_ends_one_row_and_leaves_the_others(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [8, 2, 5])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)

    class First(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
            return (input_ids[:, :8] == ids[0]).all(1) & (input_ids.shape[1] >= 10)

    for tree in TREES.values():
        out = decoder_for(model, rows, new, tree=tree).generate(
            ids, mask, max_new_tokens=NEW, temperature=0.0, stopping_criteria=StoppingCriteriaList([First()])
        )
        assert out.new_tokens == [new[0][:2], *new[1:]]
        assert [stats.finish_reason for stats in out.stats] == ["criteria", "length", "length"]


def test_a_stopped_row_does_not_write_into_its_neighbour(
    model: PreTrainedModel, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row that a criterion stops inside a path is the longest, and its path reaches the cache's last slot."""
    for module in (engine, pool):
        monkeypatch.setattr(module, "slot_bucket", lambda device: 8)
    rows = prompts(rng, [9, 4])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)

    class First(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
            return (input_ids[:, :9] == ids[0]).all(1) & (input_ids.shape[1] >= 9 + stop)

    for nodes in range(3, 9):
        for stop in (1, 2):
            decoder = decoder_for(model, rows, new, tree=TreeConfig(nodes=nodes, depth=nodes - 1, top_k=1))
            out = decoder.generate(
                ids, mask, max_new_tokens=NEW, temperature=0.0, stopping_criteria=StoppingCriteriaList([First()])
            )
            assert out.new_tokens == [new[0][:stop], new[1]], nodes


def test_max_time(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [6])
    new = greedy(model, rows)
    over = MaxTimeCriteria(max_time=1.0, initial_timestamp=time.time() - 2)
    out = decoder_for(model, rows, new).generate(
        rows[0][None], max_new_tokens=NEW, temperature=0.0, stopping_criteria=StoppingCriteriaList([over])
    )
    assert out.new_tokens == [new[0][:1]]
    assert out.stats[0].finish_reason == "criteria"


def test_stop_strings(model: PreTrainedModel, rng: torch.Generator) -> None:
    """The bundled tokenizer knows whole words only, which StopStringCriteria cannot read: one of characters, then."""
    characters = tokenizers.Tokenizer(tokenizers.models.BPE({chr(97 + n): n for n in range(VOCAB)}, []))
    characters.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    rows = prompts(rng, [6, 3])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)
    stop = tokenizer.decode(new[0][4:6])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": VOCAB + 1}  # finished rows are padded
    expected = model.generate(ids, attention_mask=mask, stop_strings=[stop], tokenizer=tokenizer, **options)
    end = tokenizer.decode(new[0]).index(stop) + 2
    assert expected[0, 6:].tolist() == new[0][:end] + [0] * (expected.shape[1] - 6 - end)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    decoder = decoder_for(model, rows, new)
    for tree in TREES.values():
        out = model.generate(
            ids, attention_mask=mask, stopping_criteria=criteria, custom_generate=decoder, tree=tree, **options
        )
        assert torch.equal(out, expected)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_streamer_gets_the_prompt_and_every_token(
    model: PreTrainedModel, tree: TreeConfig, rng: torch.Generator
) -> None:
    rows = prompts(rng, [1 if tree.nodes == 1 else 6])
    new = greedy(model, rows)
    plain, ours = Recorder(), Recorder()
    options = {"max_new_tokens": NEW, "eos_token_id": new[0][9]}
    model.generate(rows[0][None], do_sample=False, streamer=plain, **options)
    decoder_for(model, rows, new, tree=tree).generate(rows[0][None], temperature=0.0, streamer=ours, **options)
    assert ours.calls == plain.calls
    assert ours.calls[-1] == "end"


def test_streamer_is_ended_after_an_error(model: PreTrainedModel, rng: torch.Generator) -> None:
    """A consumer in another thread would wait for ever for a streamer that is never ended."""
    rows = prompts(rng, [5])

    class Raising(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
            if input_ids.shape[1] == 8:
                raise RuntimeError("criterion failed")
            return torch.zeros(1, dtype=torch.bool)

    new = greedy(model, rows)
    streamer = Recorder()
    with pytest.raises(RuntimeError, match="criterion failed"):
        decoder_for(model, rows, new).generate(
            rows[0][None],
            max_new_tokens=NEW,
            temperature=0.0,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([Raising()]),
        )
    assert streamer.calls == [rows[0].tolist(), *([token] for token in new[0][:3]), "end"]


def test_streamer_takes_one_prompt(model: PreTrainedModel) -> None:
    streamer = Recorder()
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with pytest.raises(ValueError, match="streamer must be given one prompt, was given 2"):
        decoder.generate(torch.tensor([[3, 4], [5, 6]]), max_new_tokens=2, streamer=streamer)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, was 0"):
        decoder.generate(torch.tensor([[3, 4]]), max_new_tokens=0, streamer=streamer)
    assert streamer.calls == ["end", "end"], "who waits for the text must not wait for ever"


def test_text_from_another_thread() -> None:
    pair = bundled_pair()
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, exit=ExitConfig.off(), tokenizer=tokenizer)
    ids = tokenizer("a = 3 ; b = a + 4 ; b ?", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(decoder.generate(ids, max_new_tokens=20, temperature=0.0, streamer=streamer))
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(results[0].new_tokens[0])


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_capacity_is_a_hard_limit(model: PreTrainedModel, tree: TreeConfig, rng: torch.Generator) -> None:
    rows = prompts(rng, [9, 4])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows)
    capacity = 9 + 5 + tree.nodes - 1  # the longer row has room for five more tokens
    decoder = decoder_for(model, rows, new, tree=tree, capacity=capacity)
    out = decoder.generate(ids, mask, max_new_tokens=7, temperature=0.0)
    assert out.new_tokens == [new[0][:5], new[1][:7]]
    assert [stats.finish_reason for stats in out.stats] == ["capacity", "length"]
    out = decoder.generate(ids, mask, max_new_tokens=5, temperature=0.0)
    assert [stats.finish_reason for stats in out.stats] == ["length", "length"]
    out = decoder.generate(ids, mask, max_new_tokens=NEW, temperature=0.0, eos_token_id=new[0][4])
    assert out.stats[0].finish_reason == "stop"
    # One slot less than a tree behind the prompt needs.
    for length, fits in ((capacity - tree.nodes, True), (capacity - tree.nodes + 1, False)):
        prompt = prompts(rng, [length])
        alone = decoder_for(model, prompt, greedy(model, prompt), tree=tree, capacity=capacity)
        if fits:
            stats = alone.generate(prompt[0][None], max_new_tokens=NEW, temperature=0.0).stats[0]
            assert (stats.new_tokens, stats.finish_reason) == (1, "capacity")
        else:
            words = (
                f"capacity of {capacity} slots for a tree of {tree.nodes} nodes .* up to {length - 1} .* was {length}"
            )
            with pytest.raises(ValueError, match=words):
                alone.generate(prompt[0][None], max_new_tokens=NEW, temperature=0.0)


def test_cache_grows_over_several_buckets(rng: torch.Generator) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    rows = prompts(rng, [7, 200])
    ids, mask = pad(rows, "left")
    new = greedy(model, rows, 600)
    decoder = decoder_for(model, rows, new, accuracy=0.9, tree=TreeConfig(nodes=12, depth=6, top_k=2))
    out = decoder.generate(ids, mask, max_new_tokens=600, temperature=0.0)
    assert out.new_tokens == new
    assert max(len(set(text)) for text in new) > 20, "the text says too little"


def test_a_criterion_before_the_cut_undoes_the_exit(model: PreTrainedModel, rng: torch.Generator) -> None:
    """Whatever a step read past the token that the criterion stops at leaves no mark, as if decoded one by one."""
    rows = prompts(rng, [6])
    new = greedy(model, rows)
    end = next(token for token in range(3, VOCAB) if token not in new[0])
    exit = ExitConfig(
        confidence=1.0,  # never passes: only the budget cuts
        thinking_budget=4,
        hard_budget=True,
        start_ids=(1,),
        end_ids=(end,),
        boundary_ids=(5,),
        assume_thinking=True,
    )
    for stop in (2, 4, 5, 7):
        found = []
        for tree in TREES.values():
            draft = OracleDraft([rows[0].tolist() + new[0]], accuracy=1.0, signals=lambda p, token: [p, 0.0, 1.0])
            out = SpecExitDecoder(model, draft, exit=exit, tree=tree).generate(
                rows[0][None],
                max_new_tokens=NEW,
                temperature=0.0,
                stopping_criteria=StoppingCriteriaList([After(6 + stop)]),
            )
            stats = out.stats[0]
            assert stats.trace is not None
            found.append((out.new_tokens, stats.exit_position, stats.exit_reason, stats.trace.positions))
            assert found[-1] == found[0]
        assert (found[0][1] is None) == (stop < 5)
