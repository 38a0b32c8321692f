"""Thinking in token ids: the markers around it, the ids that end a paragraph, and what stands inside.

A model thinks between a start and an end marker, each one id in most tokenizers and several in some. An exit keeps the
paragraph it falls on, so it needs to know the ids that end one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    def get_vocab(self) -> Mapping[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def batch_decode(self, sequences: Any, *, skip_special_tokens: bool) -> list[str]: ...


@dataclass(frozen=True)
class Markers:
    """Ids around the thinking text.

    start     begin it; empty: no id does
    end       end it
    force     follow where it is cut: the end marker, and what the model needs to begin its answer
    boundary  ids after which it may be cut, each by itself
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    force: tuple[int, ...]
    boundary: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """How a family of models marks its thinking, in pieces of text; a marker's tokens are those of its pieces in turn.

    `force` follows a cut; without one the end marker does. `tokens` must all be single tokens of a tokenizer of the
    family; without them the marker pieces.
    """

    start: tuple[str, ...]
    end: tuple[str, ...]
    force: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


FAMILIES = (
    Family(("<think>",), ("</think>",)),  # DeepSeek-R1, Qwen3, GLM-4.5, and most others
    Family(  # gpt-oss (harmony): the analysis channel ends with its message, and the final channel holds the answer
        ("<|channel|>", "analysis", "<|message|>"),
        ("<|end|>",),
        ("<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>"),
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    ),
    Family(("[THINK]",), ("[/THINK]",)),  # Magistral
    Family(("<seed:think>",), ("</seed:think>",)),  # Seed-OSS
    Family(("<|START_THINKING|>",), ("<|END_THINKING|>",)),  # Command A Reasoning
    Family(("<|channel>",), ("<channel|>",)),  # Gemma 4
)

# The strings that the public release splits at; those of several tokens are left out there, too.
RELEASE_BREAKS = ("\n\n", "\n\n\n", ".\n\n", ".\n\n\n", " \n\n", " \n\n\n")


def thinking_markers(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Start, end and force of the family whose tokens the vocabulary holds.

    Where no family's do, but the chat template writes `</think>`, the ids that spell out `<think>` and `</think>`. A
    word can be spelt in several ways next to others, so this is second best.

    Raises ValueError when there are no markers, naming the settings that give them.
    """
    vocabulary = tokenizer.get_vocab()
    for family in FAMILIES:
        if all(token in vocabulary for token in family.tokens or family.start + family.end):
            break
    else:
        family = FAMILIES[0]
        if family.end[0] not in str(getattr(tokenizer, "chat_template", None)):
            known = " ".join("".join(f.end) for f in FAMILIES)
            raise ValueError(
                f"tokenizer must have a marker of the end of thinking, had none of {known}: give start_ids and end_ids"
                " in ExitConfig, or switch the exit off with ExitConfig.off()"
            )

    def spell(pieces: Iterable[str]) -> tuple[int, ...]:
        found: list[int] = []
        for piece in pieces:
            found += [vocabulary[piece]] if piece in vocabulary else _encode(tokenizer, piece)
        return tuple(found)

    end = spell(family.end)
    return spell(family.start), end, spell(family.force) or end


def release_end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end of thinking as the public release has it: the first id of `</think>`.

    Raises ValueError when the tokenizer cannot encode it.
    """
    return tuple(_encode(tokenizer, "</think>")[:1])


def release_breaks(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ends of a paragraph as the public release has them: those strings of its list that are one token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    encoded = (tokenizer.encode(text, add_special_tokens=False) for text in RELEASE_BREAKS)
    return tuple(sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown}))


def paragraph_breaks(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id whose text ends a paragraph: the white space at its end holds at least two line feeds.

    So "\\n\\n", ".\\n\\n", "\\n\\n\\n", "\\r\\n\\r\\n", "\\n  \\n" and "):\\n\\n  " do, "\\n" and "\\n\\nThe" do not. A
    tokenizer that spells line feeds one by one has none. The whole vocabulary is decoded, once, id by id.
    """
    every = sorted(set(tokenizer.get_vocab().values()))
    alone = [[index] for index in every]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the fast tokenizers' own batch: 150,000 ids in a fraction of a second
        texts = backend.decode_batch(alone, skip_special_tokens=False)
    else:
        texts = tokenizer.batch_decode(alone, skip_special_tokens=False)
    return tuple(index for index, text in zip(every, texts, strict=True) if text[len(text.rstrip()) :].count("\n") > 1)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text by itself. Raises ValueError when it has none or an unknown one."""
    found = list(tokenizer.encode(text, add_special_tokens=False))
    if not found or getattr(tokenizer, "unk_token_id", None) in found:
        raise ValueError(f"tokenizer must be able to encode {text!r}, was not; give the ids in ExitConfig")
    return found


def is_thinking(tokens: Sequence[int], markers: Markers, assume: bool | None = None) -> bool:
    """Whether a text ends inside the thinking: after its last marker, if that is a start. `assume` overrides it."""
    if assume is not None:
        return assume
    for stop in range(len(tokens), 0, -1):
        if _ends_with(tokens, stop, markers.end):
            return False
        if _ends_with(tokens, stop, markers.start):
            return True
    return False


def count_thinking_tokens(
    prompt: Sequence[int], generated: Sequence[int], markers: Markers, assume: bool | None = None
) -> int:
    """How many of the generated tokens stand inside the thinking text: between its markers, which may have several ids.

    prompt      ids before; they tell whether thinking has begun, unless `assume` does
    generated   ids; a marker may reach back into the prompt
    """
    thinking = is_thinking(prompt, markers, assume)
    text = [*prompt, *generated]
    count = recent = 0  # tokens inside, and those of them since thinking last began
    for stop in range(len(prompt) + 1, len(text) + 1):
        if _ends_with(text, stop, markers.end):
            count -= min(recent, len(markers.end) - 1)  # the marker's other ids, which had looked like thinking
            thinking, recent = False, 0
        elif thinking:
            count, recent = count + 1, recent + 1
        else:
            thinking = _ends_with(text, stop, markers.start)
    return count


def _ends_with(tokens: Sequence[int], stop: int, marker: tuple[int, ...]) -> bool:
    """Whether tokens[:stop] ends with the marker; an empty marker ends nothing."""
    start = stop - len(marker)
    return bool(marker) and start >= 0 and tuple(tokens[start:stop]) == marker
