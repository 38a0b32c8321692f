"""Extractors: where the answer stands in a reply, and when two answers are the same."""

from __future__ import annotations

import builtins
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from specexit.training.answers import Boxed, Extractor, by_name, closing_brace, name_of


def found(name: str, text: str) -> str | None:
    """The answer, its place checked: there is no other text there."""
    answer = by_name(name).find(text)
    if answer is None:
        return None
    assert text[answer[1] : answer[2]] == answer[0]
    return answer[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{42}.", "42"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ {a}{b} } \boxed{", "{a}{b}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{3} \boxed{ }", "3"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x\\}", r"x\\"),
        (r"\boxed{4", None),
        (r"\boxed{}", None),
        ("42", None),
        ("", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert found("boxed", text) == answer
    assert by_name("boxed").complete(text) == (answer is not None)


def test_a_brace_is_closed_where_as_many_have_been_closed_as_opened(rng: torch.Generator) -> None:
    for _ in range(200):
        text = "".join("{}a"[n] for n in torch.randint(0, 3, (12,), generator=rng).tolist())
        depth = [1 + text[: n + 1].count("{") - text[: n + 1].count("}") for n in range(len(text))]
        assert closing_brace(text, 0) == (depth.index(0) if 0 in depth else None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\n\nThe answer is 07.", "07"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("(-3)", "-3"),
        ("it is −4 degrees", "−4"),
        ("+8", "+8"),
        ("$1,234.50", "1,234.50"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("3.14.", "3.14"),
        (".5", ".5"),
        ("3/4", "3/4"),
        ("3 / 4", "3 / 4"),
        ("1e-3", "1e-3"),
        ("5kg", "5"),
        ("50%", "50"),
        ("one, 2, x3", "2"),
        ("H2O", None),
        ("none", None),
        ("-", None),
        ("", None),
    ],
)
def test_last_number(text: str, answer: str | None) -> None:
    assert found("last-number", text) == answer
    assert not by_name("last-number").complete(text)


def test_the_last_number_of_many_is_found_and_read(rng: torch.Generator) -> None:
    extractor = by_name("last-number")
    for _ in range(200):
        whole, part, sign = torch.randint(0, 10**7, (3,), generator=rng).tolist()
        written = f"{'-' if sign % 2 else ''}{whole:,}.{part}"
        assert found("last-number", f"we have {part:,} and {sign}, so {written}. Done") == written
        assert extractor.same(written, written.replace(",", "") + "00")
        assert not extractor.same(written, written + "1")


@pytest.mark.parametrize("name", ["last-number", "boxed"])
@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("07", "7", True),
        ("7.0", "7", True),
        ("1,000", "1000", True),
        ("3/4", "0.75", True),
        ("6/8", "3/4", True),
        ("-2", "−2", True),
        ("1e3", "1000", True),
        ("0.1", "1/10", True),
        ("7", "8", False),
        ("-7", "7", False),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
        ("1" * 5000, "1" * 5000, True),  # more digits than Python reads
        ("1" * 5000, "1" * 5001, False),
    ],
)
def test_numbers_are_the_same_by_value(name: str, a: str, b: str, same: bool) -> None:
    assert by_name(name).same(a, b) is same
    assert by_name(name).same(b, a) is same


def test_values_are_those_of_exact_arithmetic(rng: torch.Generator) -> None:
    extractor = by_name("last-number")
    for _ in range(200):
        a, b, c, d = torch.randint(1, 12, (4,), generator=rng).tolist()
        assert extractor.same(f"{a}/{b}", f"{c}/{d}") == (Fraction(a, b) == Fraction(c, d))


def test_the_right_answer_may_be_a_whole_solution() -> None:
    assert by_name("last-number").same("42", "6 * 7 = 42\n#### 42")
    assert by_name("boxed").same("x + 1", r"so it is \boxed{x+1}")
    assert not by_name("boxed").same("x + 1", r"so it is \boxed{x+2}")


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"answer: (\w+)", "answer: a answer: b", "b"),
        (r"[A-D]", "A or B?", "B"),
        (r"(?:is )(x)?", "is x is ", "x"),  # a match whose group took no part is none
        (r"=(.*)$", "y = 3 ", "3"),
        (r"Q", "A", None),
    ],
)
def test_regex(pattern: str, text: str, answer: str | None) -> None:
    assert found(f"regex:{pattern}", text) == answer
    assert not by_name(f"regex:{pattern}").complete(text)


def test_text() -> None:
    assert found("text", " a  b\n") == "a  b"
    assert found("text", " \n") is None
    assert by_name("text").same("a  b", "a b")
    assert not by_name("text").same("a b", "a c")
    assert not by_name("text").complete("a")


# --- math-verify


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}, as said", r"\frac{1}{2}"),
        ("the answer is 0.5", "0.5"),
        ("no idea", None),
    ],
)
def test_math_verify_finds(text: str, answer: str | None) -> None:
    pytest.importorskip("math_verify")
    assert found("math-verify", text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("1/3", "0.3", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("42", r"thus \boxed{42}", True),
        ("x+1", "x+2", False),
        ("blue", "blue", True),
        ("blue", "red", False),
    ],
)
def test_math_verify_compares(a: str, b: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    extractor = by_name("math-verify")
    assert extractor.same(a, b) is same
    assert extractor.same(b, a) is same


def test_math_verify_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install math-verify"):
        by_name("math-verify")


# --- names


def test_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object, a class or a function that makes one."""
    (tmp_path / "own_extractor.py").write_text(
        "class First:\n"
        "    def find(self, text): return (text[0], 0, 1) if text else None\n"
        "    def same(self, a, b): return a == b\n"
        "    def complete(self, text): return bool(text)\n"
        "ready = First()\n"
        "def make(): return First()\n"
        "class Half:\n"
        "    def find(self, text): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_extractor:First", "own_extractor:ready", "own_extractor:make"):
        assert found(name, "abc") == "a"
        assert name_of(name) == name
    own: Extractor = by_name("own_extractor:ready")
    assert name_of(own) == "own_extractor:First"
    with pytest.raises(TypeError, match=r"'own_extractor:Half' has no same"):
        by_name("own_extractor:Half")
    with pytest.raises(ValueError, match="own_extractor, which has no Last"):
        by_name("own_extractor:Last")
    sys.modules.pop("own_extractor")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("box", ValueError, r"extractor must be one of boxed, last-number, text, .*, was 'box'"),
        ("", ValueError, "extractor must be one of"),
        ("json:", ValueError, "extractor must be one of"),
        ("regex:(", ValueError, r"extractor must have a valid pattern, was '\('"),
        ("no_such_module_at_all:x", ImportError, "is its folder in PYTHONPATH"),
    ],
)
def test_names_that_are_none(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        by_name(name)


def test_names_of_objects() -> None:
    assert name_of("boxed") == "boxed"
    assert name_of(Boxed()) == "specexit.training.answers:Boxed"
