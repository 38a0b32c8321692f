"""What a decoder holds, and what it says and does where memory is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lossless import prompts
from tiny_models import tiny_model

from specexit import Completion, ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair, cache, engine
from specexit.cache import SlotCache
from specexit.memory import held, readable


def test_memory_of_an_idle_decoder_is_its_weights() -> None:
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft)
    memory = decoder.memory()
    assert memory.base == sum(p.nbytes for p in decoder.model.parameters()) + sum(
        b.nbytes for b in decoder.model.buffers()
    )
    assert isinstance(decoder.draft, torch.nn.Module)
    own = sum(p.nbytes for p in decoder.draft.parameters()) + sum(b.nbytes for b in decoder.draft.buffers())
    assert memory.draft == own
    assert memory.total == memory.base + memory.draft
    assert (memory.cache, memory.graph, memory.slots) == (0, 0, 0)
    assert str(memory).startswith("base 6.5 MB, draft ")


def test_memory_while_decoding() -> None:
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, capacity=192)
    results = decoder.generate_many([[3, 4, 5]] * 3, slots=2, max_new_tokens=20, temperature=0.0)
    next(results)
    memory = decoder.memory()
    config = decoder.model.config
    slot = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    assert decoder.base.slot_bytes == slot
    assert memory.slots == 2 * 192
    assert memory.cache == 2 * 192 * slot
    assert memory.drafts_cache > 0
    assert memory.buffers > 0
    next(results)
    assert decoder.memory() == memory, "no step adds to it"
    assert len(list(results)) == 1
    assert decoder.memory().cache == 0


def test_held_counts_storages_once() -> None:
    x = torch.zeros(10, 4)
    assert held(x, x[2:], {"a": [x.view(-1)]}) == 160
    assert held(x, torch.zeros(2, dtype=torch.int64)) == 176
    assert held() == 0


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB")])
def test_sizes_for_people(size: float, text: str) -> None:
    assert readable(size) == text


def short_of_memory(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """A device with `free` bytes, which allocations of caches find out."""
    original = SlotCache.__init__

    def allocate(self: SlotCache, forms: Any, lengths: Any, slots: int) -> None:
        if slots * len(lengths) * sum(form.nbytes for form in forms if form) > free:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, forms, lengths, slots)

    monkeypatch.setattr(SlotCache, "__init__", allocate)
    monkeypatch.setattr(engine, "available", lambda device: free)


def test_out_of_memory_at_set_up_says_what_would_fit(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    decoder = SpecExitDecoder(tiny_model("llama"), exit=ExitConfig.off(), capacity=500)
    slot = decoder.base.slot_bytes
    short_of_memory(monkeypatch, 1210 * slot)
    rows = torch.stack([row[:4] for row in prompts(rng, [4] * 5)])
    message = rf"a cache of 5 x 500 slots takes .*{readable(2500 * slot)}.* were free.*5 x 242 slots.*2 x 500 slots"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        decoder.generate(rows, max_new_tokens=4, temperature=0.0)
    # What it says does fit.
    assert len(decoder.generate(rows[:2], max_new_tokens=4, temperature=0.0).new_tokens) == 2
    decoder = SpecExitDecoder(decoder.model, exit=ExitConfig.off(), capacity=242)
    assert len(decoder.generate(rows, max_new_tokens=4, temperature=0.0).new_tokens) == 5


def test_rows_end_where_memory_does(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    """A cache that cannot grow keeps what is decoded, and says why it ends."""
    model = tiny_model("llama")
    rows = prompts(rng, [6, 9])
    decoder = SpecExitDecoder(model, exit=ExitConfig.off(), tree=TreeConfig.none())
    monkeypatch.setattr(engine, "available", lambda device: 0)
    found = list(decoder.generate_many(rows, slots=2, max_new_tokens=100, temperature=0.0))
    for completion in found:
        assert completion.stats.finish_reason == "capacity"
        row = len(rows[completion.index])
        assert len(completion.new_tokens) == 64 - row, "one bucket of slots"
        text = model.generate(rows[completion.index][None], max_new_tokens=100, do_sample=False)
        assert completion.new_tokens == text[0, row:64].tolist()


def test_a_prompt_that_memory_cannot_hold(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    model = tiny_model("llama")
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    monkeypatch.setattr(engine, "available", lambda device: 0)
    rows = prompts(rng, [6, 5, 4, 90, 4, 4])
    for slots in (1, 2, 3, 6):
        found: list[Completion] = []
        with pytest.raises(torch.OutOfMemoryError, match=r"fit in the cache.* x 64 slots, prompts\[3\] has 90 tokens"):
            found.extend(decoder.generate_many(rows, slots=slots, max_new_tokens=5, temperature=0.0))
        assert sorted(completion.index for completion in found) == [0, 1, 2], slots


def test_a_cache_that_is_too_large_in_the_middle_of_growing(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    """Some layers have grown and the others cannot: the sequences end, with all that is decoded."""
    model = tiny_model("llama")
    row = prompts(rng, [9])[0][None]
    text = model.generate(row, max_new_tokens=100, do_sample=False)
    decoder = SpecExitDecoder(model, exit=ExitConfig.off(), tree=TreeConfig.none())
    count, original = [0], cache.grown

    def grown(old: torch.Tensor, slots: int) -> torch.Tensor:
        count[0] += 1
        if count[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(old, slots)

    monkeypatch.setattr(cache, "grown", grown)
    out = decoder.generate(row, max_new_tokens=100, temperature=0.0)
    assert count[0] > 3
    assert out.stats[0].finish_reason == "capacity"
    assert out.sequences[0].tolist() == text[0, :64].tolist()
