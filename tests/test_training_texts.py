"""Problems and texts: reading them, and telling thinking and reply apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specexit import ExitConfig, bundled_pair
from specexit.bundled import load_problems
from specexit.exit import markers_for
from specexit.thinking import Markers
from specexit.training.problems import Problem, problems_fingerprint, read_problems
from specexit.training.texts import CUT, EMPTY, STOPPED, UNBEGUN, UNENDED, Text, part, read_texts, reply_ids

VOCAB = 80  # of a base of the bundled tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(bundled_pair().base)


@pytest.fixture(scope="module")
def markers(tokenizer: PreTrainedTokenizerFast) -> Markers:
    return markers_for(ExitConfig(), tokenizer)


def lines(path: Path, *contents: Any) -> Path:
    path.write_text("".join((c if isinstance(c, str) else json.dumps(c)) + "\n" for c in contents))
    return path


# --- problems


def test_the_bundled_problems(tokenizer: PreTrainedTokenizerFast) -> None:
    found = read_problems(bundled_pair().test, tokenizer)
    for problem, expected in zip(found, load_problems(), strict=True):
        assert (problem.id, problem.answer) == (expected.id, expected.answer)
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": expected.question}], add_generation_prompt=True, tokenize=False
        )
        assert list(problem.prompt) == tokenizer.encode(chat, add_special_tokens=False)
    assert read_problems(bundled_pair().test, tokenizer, limit=3) == found[:3]
    assert problems_fingerprint(found) != problems_fingerprint(found[::-1])
    assert problems_fingerprint(found) == problems_fingerprint(list(found))


def test_three_ways_to_ask(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<bos> <user> a = 5 ; a ? <assistant> <think>\n\n"
    path = lines(
        tmp_path / "p",
        {"id": 1, "question": "a = 5 ; a ?", "answer": 5},
        "",
        {"id": "b", "messages": [{"role": "user", "content": "a = 5 ; a ?"}], "level": 3},
        {"id": "c", "prompt": text},
    )
    one, two, three = read_problems(path, tokenizer)
    assert one.prompt == two.prompt == three.prompt
    assert (one.id, one.answer) == ("1", "5")
    assert two.answer is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", r"line 2 must be a JSON object, was '\[1\]'"),
        ({"question": "a"}, "line 2: id must be a text or an int, was None"),
        ({"id": True, "question": "a"}, "line 2: id must be"),
        ({"id": "a", "question": "a"}, "line 2: id must be unique, 'a' was there before"),
        ({"id": "b"}, "line 2: one of question, prompt, messages must be given, was none"),
        ({"id": "b", "question": "a", "prompt": "b"}, "must be given, was question and prompt"),
        ({"id": "b", "question": 3}, "line 2: question must be a text, was int"),
        ({"id": "b", "prompt": ""}, "line 2: prompt must hold tokens, was ''"),
        ({"id": "b", "messages": "hello"}, "messages must be a list of objects with role and content"),
        ({"id": "b", "messages": [{"role": "user"}]}, "messages must be a list of objects"),
        ({"id": "b", "question": "a", "answer": [1]}, "answer must be a text or a number, was list"),
    ],
)
def test_a_wrong_problem_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: Any, message: str
) -> None:
    path = lines(tmp_path / "p", {"id": "a", "question": "a"}, content)
    with pytest.raises(ValueError, match=message) as raised:
        read_problems(path, tokenizer)
    assert str(raised.value).startswith(str(path))


def test_no_problems_and_no_template(tmp_path: Path) -> None:
    bare = AutoTokenizer.from_pretrained(bundled_pair().base)
    bare.chat_template = None
    with pytest.raises(ValueError, match="must hold problems, was empty"):
        read_problems(lines(tmp_path / "p", ""), bare)
    with pytest.raises(ValueError, match="line 1: question needs a tokenizer with a chat template"):
        read_problems(lines(tmp_path / "p", {"id": 1, "question": "a"}), bare)
    assert read_problems(lines(tmp_path / "p", {"id": 1, "prompt": "a"}), bare)


# --- parts of a text


def letters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_texts_are_parted_at_their_markers(rng: torch.Generator) -> None:
    """Random texts of few ids, so that markers of one, two and three ids occur everywhere, against searches in a
    string: the thinking begins behind the prompt's last marker, or behind the first start that ends after it."""
    seen = set()
    for _ in range(600):
        sizes = torch.randint(1, 4, (2,), generator=rng).tolist()
        start = tuple([97] * sizes[0])
        end = tuple([98] * sizes[1])
        markers = Markers(start, end, end, (99,))
        ids = (97 + torch.randint(0, 3, (14,), generator=rng)).tolist()
        split = int(torch.randint(1, 8, (), generator=rng))
        prompt, completion = ids[:split], ids[split:]
        cut = bool(torch.rand((), generator=rng) < 0.5)
        text = part(Problem("p", tuple(prompt)), 0, completion, markers, cut)

        whole, opened, closed = letters(ids), letters(list(start)), letters(list(end))
        begins: int | None = split
        if not whole[:split].rfind(opened) > whole[:split].rfind(closed):
            at = whole.find(opened, max(split - len(start) + 1, 0))
            begins = None if at < 0 else at + len(start)
        ends = -1 if begins is None else whole.find(closed, begins)
        if begins is None:
            expected = UNENDED if cut else UNBEGUN
            begins, ends = split, len(ids)
        elif ends < 0:
            expected, ends = UNENDED if cut else STOPPED, len(ids)
        else:
            expected = EMPTY if ends == begins else None
        assert text.flaw == expected
        assert letters(text.prompt) == whole[:begins]
        assert letters(text.thinking) == whole[begins:ends]
        assert letters(text.reply) == whole[ends:]
        assert text.written == len(completion)
        seen.add(expected)
    assert seen == {None, EMPTY, STOPPED, UNBEGUN, UNENDED}


def test_what_leads_to_an_answer_is_no_reply() -> None:
    def reply(ids: list[int], force: tuple[int, ...]) -> list[int]:
        return reply_ids(Text(Problem("p", (1,)), 0, [1], [2], ids, 2), Markers((3,), (4,), force, (5,)))

    assert reply([4, 6, 7], (4,)) == [6, 7]
    assert reply([4, 6, 7], (4, 6)) == [7]
    assert reply([4, 7, 6], (4, 6)) == [7, 6]


# --- texts that exist


def test_texts_and_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, markers: Markers) -> None:
    problem = Problem("a", tuple(tokenizer.encode("<user> a = 5 ; a ? <assistant> <think>\n\n")), "05")
    written = "Start with a = 5.\n\n</think>\n\nThe answer is 05. <eos>"
    ids = tokenizer.encode(written, add_special_tokens=False)
    path = lines(
        tmp_path / "t", {"id": "a", "completion": written}, {"id": "a", "sample": 2, "completion_ids": ids, "more": 1}
    )
    one, two = read_texts(path, [problem], tokenizer, markers, VOCAB)
    assert (one.sample, two.sample) == (0, 2)
    assert one.thinking == two.thinking == tokenizer.encode("Start with a = 5.\n\n", add_special_tokens=False)
    assert one.prompt == list(problem.prompt)
    assert [*one.thinking, *one.reply] == ids
    assert one.flaw is None
    # A base that begins the thinking itself: what it wrote until then counts as prompt.
    asked = Problem("a", tuple(tokenizer.encode("<user> a = 5 ; a ? <assistant>")))
    path = lines(tmp_path / "t", {"id": "a", "completion": "<think>\n\n" + written})
    (three,) = read_texts(path, [asked], tokenizer, markers, VOCAB)
    assert three.prompt == [*asked.prompt, *markers.start]
    assert three.thinking == [*tokenizer.encode("\n\n", add_special_tokens=False), *one.thinking]
    assert three.written == len(ids) + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"id": "b", "completion": "a"}, "id must be that of a problem, was 'b'"),
        ({"id": "a"}, "completion or completion_ids must be given, and not both"),
        ({"id": "a", "completion": "a", "completion_ids": [1]}, "and not both"),
        ({"id": "a", "completion": 3}, "completion must be a text, was int"),
        ({"id": "a", "completion_ids": "abc"}, "completion_ids must be a sequence of token ids, was str"),
        ({"id": "a", "completion_ids": [1, -1]}, "completion_ids must hold ids of at least 0, was -1"),
        ({"id": "a", "completion_ids": [1, 80]}, r"must be in \[0, 80\), .* was 80: are they of another tokenizer"),
        ({"id": "a", "sample": -1, "completion": "a"}, "sample must be at least 0"),
        ({"id": "a", "completion": "Start with a."}, r"must have an end of thinking, had none: no '</think>' \(ids"),
        ({"id": "a", "completion": ""}, "must have an end of thinking, had none"),
        ({"id": "a", "sample": 1, "completion": "a </think> 5"}, "sample 1 of 'a' was there before"),
    ],
)
def test_a_wrong_text_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, markers: Markers, content: Any, message: str
) -> None:
    problem = Problem("a", tuple(tokenizer.encode("<think>\n\n")))
    path = lines(tmp_path / "t", {"id": "a", "sample": 1, "completion": "a </think> 5"}, content)
    with pytest.raises(ValueError, match=message) as raised:
        read_texts(path, [problem], tokenizer, markers, VOCAB)
    assert str(raised.value).startswith(f"{path}, line 2: ")


def test_markers_that_the_ids_do_not_hold(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, markers: Markers) -> None:
    """The text has an end of thinking, which this tokenizer makes part of a longer word."""
    vocabulary = {word: n for n, word in enumerate(["<unk>", "<think>", "</think>", "a"])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    own, problem = Markers((1,), (2,), (2,), (3,)), Problem("a", (1,))
    (text,) = read_texts(lines(tmp_path / "t", {"id": "a", "completion": "a </think> a"}), [problem], other, own, 4)
    assert text.thinking == [3]
    path = lines(tmp_path / "t", {"id": "a", "completion": "a</think>a"})
    with pytest.raises(ValueError, match=r"it holds '</think>', but its ids do not hold \[2\]: is it of another tok"):
        read_texts(path, [problem], other, own, 4)


def test_a_text_that_never_begins_to_think_and_no_texts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, markers: Markers
) -> None:
    asked = Problem("a", tuple(tokenizer.encode("a ?")))
    with pytest.raises(ValueError, match=r"must have a start of thinking, had none: no '<think>' \(ids "):
        read_texts(lines(tmp_path / "t", {"id": "a", "completion": "a </think> 5"}), [asked], tokenizer, markers, VOCAB)
    with pytest.raises(ValueError, match="must hold texts, was empty"):
        read_texts(lines(tmp_path / "t", ""), [asked], tokenizer, markers, VOCAB)


def test_flaws_differ() -> None:
    assert len({UNBEGUN, UNENDED, STOPPED, EMPTY, CUT}) == 5
