"""Markers and paragraph breaks of real tokenizers, built here, and what stands inside the thinking text."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specexit.bundled import bundled_pair
from specexit.thinking import (
    Markers,
    count_thinking_tokens,
    is_thinking,
    paragraph_breaks,
    release_breaks,
    release_end,
    thinking_markers,
)

BREAKS = ["\n\n", ".\n\n", "\n\n\n", " \n\n", "\n \n", "\r\n\r\n", ":\n\n  ", "```\n\n"]
NOT_BREAKS = ["\n", ".\n", " ", "\n\nThe", "think", "\n  "]
TEXT = [
    "The first paragraph.\n\nThe second:\n\n\n  code ```\n\nThe end.\n",
    "So 7 * 8 = 56.\n\nWait. \n\nSo it is 56.\r\n\r\n",
]


def wrap(tokenizer: Tokenizer, added: list[str], **options: object) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_level(*added: str, words: list[str] | None = None, **options: object) -> PreTrainedTokenizerFast:
    """As of Qwen and Llama 3: bytes for characters, and a vocabulary that also holds `words`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: n for n, symbol in enumerate(alphabet)}
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in words or []:
        vocabulary.setdefault("".join(piece for piece, _ in spell.pre_tokenize_str(word)), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = spell
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer, list(added), **options)


def trained_byte_level(*added: str) -> PreTrainedTokenizerFast:
    """Trained with the splitting of GPT-4 and Qwen, which keeps line feeds with the punctuation before them."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT * 20, BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return wrap(tokenizer, list(added))


def sentencepiece(*added: str, words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """As of Llama 2 and Gemma: a mark for spaces, and bytes for characters that it does not have."""
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.:<>/", *(words or [])]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer, list(added), unk_token="<unk>")


def unigram(*added: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    tokenizer.train_from_iterator(TEXT * 20, UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"]))
    return wrap(tokenizer, list(added), unk_token="<unk>")


def texts(tokenizer: PreTrainedTokenizerFast, found: tuple[int, ...]) -> set[str]:
    return {tokenizer.decode([index]) for index in found}


def test_every_single_token_break_of_a_byte_level_vocabulary() -> None:
    tokenizer = byte_level(words=BREAKS + NOT_BREAKS)
    assert texts(tokenizer, paragraph_breaks(tokenizer)) == set(BREAKS)


def test_breaks_of_a_trained_byte_level_vocabulary() -> None:
    tokenizer = trained_byte_level("</think>")
    found = paragraph_breaks(tokenizer)
    for text in ("The second.\n\n", "end.\r\n\r\n"):
        assert tokenizer.encode(text)[-1] in found, text
    assert all(text.rstrip() + "\n\n" == text or text.count("\n") > 1 for text in texts(tokenizer, found))
    assert tokenizer.encode("end.\n")[-1] not in found


def test_breaks_of_a_sentencepiece_vocabulary() -> None:
    tokenizer = sentencepiece(words=["\n\n", ".\n\n", "▁\n\n", "\n", "\n\na"])
    assert texts(tokenizer, paragraph_breaks(tokenizer)) >= {"\n\n", ".\n\n"}
    assert len(paragraph_breaks(tokenizer)) == 3
    assert paragraph_breaks(sentencepiece()) == ()  # only the byte of one line feed
    trained = unigram()
    assert texts(trained, paragraph_breaks(trained)) == {
        text
        for text in texts(trained, tuple(trained.get_vocab().values()))
        if text[len(text.rstrip()) :].count("\n") > 1
    }


def test_the_bundled_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_pair().base)
    assert thinking_markers(tokenizer) == ((5,), (6,), (6,))
    assert paragraph_breaks(tokenizer) == (7,)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a = 7 2 ; a ?"}], add_generation_prompt=True)
    markers = Markers((5,), (6,), (6,), (7,))
    assert is_thinking(prompt["input_ids"], markers)


def test_a_slow_tokenizer_is_decoded_by_its_own_batch() -> None:
    class Slow:
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, ".\n\n": 3, "\n": 5}

        def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
            assert not skip_special_tokens
            return [{0: "a", 3: ".\n\n", 5: "\n"}[i] for (i,) in sequences]

    assert paragraph_breaks(Slow()) == (3,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("added", "start", "end", "force"),
    [
        (["<think>", "</think>"], ["<think>"], ["</think>"], ["</think>"]),
        (["[THINK]", "[/THINK]"], ["[THINK]"], ["[/THINK]"], ["[/THINK]"]),
        (["<seed:think>", "</seed:think>"], ["<seed:think>"], ["</seed:think>"], ["</seed:think>"]),
        (
            ["<|START_THINKING|>", "<|END_THINKING|>"],
            ["<|START_THINKING|>"],
            ["<|END_THINKING|>"],
            ["<|END_THINKING|>"],
        ),
        (["<|channel>", "<channel|>"], ["<|channel>"], ["<channel|>"], ["<channel|>"]),
        (
            ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
            ["<|channel|>", "analysis", "<|message|>"],
            ["<|end|>"],
            ["<|end|>", "<|start|>", "assistant", "<|channel|>", "final", "<|message|>"],
        ),
    ],
)
def test_marker_families(added: list[str], start: list[str], end: list[str], force: list[str]) -> None:
    words = ["analysis", "assistant", "final", "think"]
    for tokenizer in (byte_level(*added, words=words), sentencepiece(*added, words=words)):
        ids = tokenizer.get_vocab()
        expected = tuple(tuple(ids[piece] for piece in pieces) for pieces in (start, end, force))
        assert thinking_markers(tokenizer) == expected


def test_markers_of_several_ids_are_those_of_the_template() -> None:
    template = "{{ '<think>' }}...{{ '</think>' }}"
    tokenizer = byte_level(words=["think"], chat_template=template)
    start, end, force = thinking_markers(tokenizer)
    assert tokenizer.decode(list(start)) == "<think>"
    assert tokenizer.decode(list(end)) == "</think>"
    assert len(end) > 1
    assert force == end
    assert release_end(tokenizer) == end[:1]


def test_a_tokenizer_without_markers_says_how_to_give_them() -> None:
    for tokenizer in (byte_level(), byte_level("</think>"), sentencepiece()):
        with pytest.raises(ValueError, match="give start_ids and end_ids in ExitConfig, or switch the exit off"):
            thinking_markers(tokenizer)


def test_release_breaks_are_those_of_its_list_that_are_one_token() -> None:
    tokenizer = byte_level("\n\n", ".\n\n", "):\n\n", " \n\n\n")
    assert texts(tokenizer, release_breaks(tokenizer)) == {"\n\n", ".\n\n", " \n\n\n"}
    assert release_breaks(sentencepiece()) == ()


START, END, LONG = (1,), (2,), Markers((1, 1), (1, 2, 1), (1, 2, 1), ())
SHORT = Markers(START, END, END, ())


@pytest.mark.parametrize(
    ("text", "thinking"),
    [([], False), ([1], True), ([7, 1, 8], True), ([1, 2], False), ([1, 2, 7, 1], True), ([2, 7], False)],
)
def test_thinking_of_a_prompt(text: list[int], thinking: bool) -> None:
    assert is_thinking(text, SHORT) is thinking
    assert is_thinking(text, SHORT, assume=True) is True
    assert is_thinking(text, SHORT, assume=False) is False


def test_thinking_of_a_prompt_with_long_markers() -> None:
    for text, thinking in (([1, 1], True), ([1], False), ([1, 1, 2, 1], False), ([1, 1, 2], True), ([2, 1, 1], True)):
        assert is_thinking(text, LONG) is thinking
    assert is_thinking([7, 1], Markers((), END, END, ())) is False


@pytest.mark.parametrize(
    ("prompt", "generated", "count"),
    [
        ([1], [7, 8, 2, 9], 2),
        ([7], [1, 7, 8, 9, 2, 9], 3),  # begins in the generated text
        ([7], [7, 8], 0),
        ([1, 8, 8], [7], 1),  # the prompt's thinking does not count
        ([1], [7, 2, 7, 1, 7, 7, 2], 3),  # twice
        ([1], [2], 0),
        ([1], [7, 1, 7], 3),  # a start inside is text like any other
    ],
)
def test_counting_thinking_tokens(prompt: list[int], generated: list[int], count: int) -> None:
    assert count_thinking_tokens(prompt, generated, SHORT) == count
    assert count_thinking_tokens(prompt, generated, SHORT, assume=False) <= count


def test_counting_leaves_out_all_ids_of_a_long_marker() -> None:
    assert count_thinking_tokens([1, 1], [7, 8, 1, 2, 1, 9], LONG) == 2
    assert count_thinking_tokens([7], [1, 1, 7, 8], LONG) == 2
    assert count_thinking_tokens([1, 1, 7, 1], [2, 1, 9], LONG) == 0  # the end began in the prompt


def test_counting_agrees_with_a_search(rng: torch.Generator) -> None:
    source = random.Random(int(torch.randint(2**40, (), generator=rng)))
    for _ in range(50):
        text = [source.choices((1, 2, 7, 8), (1, 1, 5, 5))[0] for _ in range(30)]
        cut = source.randint(0, 30)
        inside, expected = False, 0
        for position, token in enumerate(text):
            before, inside = inside, (inside or token == 1) and token != 2
            expected += before and inside and position >= cut
        assert count_thinking_tokens(text[:cut], text[cut:], SHORT) == expected
