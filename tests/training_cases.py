"""Random traces, and files of them, for tests of training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tiny_models import VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from specexit.identity import fingerprint
from specexit.training.records import Trace, TraceFile, sufficient_length


def random_trace(
    rng: torch.Generator,
    *,
    name: str = "p",
    sample: int = 0,
    prompt: int | None = None,
    thinking: int | None = None,
    boundaries: list[int] | None = None,
    ends_at_boundary: bool = True,
    flaw: str | None = None,
) -> Trace:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=rng).tolist()

    count = thinking or integer(8, 30)
    if boundaries is None:
        chosen = torch.randperm(count, generator=rng)[: integer(1, min(5, count))] + 1
        boundaries = sorted({*chosen.tolist(), count} if ends_at_boundary else {*chosen.tolist()} - {count} or {1})
    agrees = [bool(integer(0, 1)) for _ in boundaries]
    return Trace(
        id=name,
        sample=sample,
        prompt=tokens(prompt or integer(2, 8)),
        thinking=tokens(count),
        reply=tokens(integer(1, 6)),
        boundaries=boundaries,
        answers=["1" if yes else "2" for yes in agrees],
        probabilities=torch.rand(len(boundaries), generator=rng).tolist(),
        agrees=agrees,
        final="1",
        sufficient=sufficient_length(boundaries, agrees, count),
        flaw=flaw,
    )


def write_traces(path: Path, model: nn.Module, traces: Sequence[Trace]) -> Path:
    with TraceFile(path, {"base": fingerprint(model)}) as file:
        for trace in traces:
            file.append(trace)
    return path


def fresh_model(folder: Path) -> Path:
    """A random model with windows, and a tokenizer of words: v0, v1, ... and the markers."""
    words = [f"v{n}" for n in range(VOCAB)]
    words[:8] = ["<pad>", "<bos>", "<eos>", "<unk>", "<think>", "</think>", "\n\n", "."]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", additional_special_tokens=["<eos>"]
    )
    fast.save_pretrained(folder)
    tiny_model("mistral_window", seed=random.randrange(2**31)).save_pretrained(folder)
    return folder


def write_texts(problems: Path, texts: Path, ids: Iterable[int]) -> None:
    """Problems for `fresh_model`, and texts of twelve paragraphs that answer them."""

    def paragraphs() -> str:
        return "".join(f"v{random.randrange(9, VOCAB)} v{random.randrange(9, VOCAB)} \n\n" for _ in range(12))

    asked = [{"id": n, "prompt": "v20 v21 <think>", "answer": "v30"} for n in ids]
    said = [{"id": one["id"], "completion": f"{paragraphs()}</think> v30 <eos>"} for one in asked]
    for path, lines in ((problems, asked), (texts, said)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
