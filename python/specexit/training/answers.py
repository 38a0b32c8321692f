"""Where the answer stands in a reply, and when two answers are the same: extractors, by name or your own.

boxed            the last \\boxed{...}
last-number      the last number: 42, -1,234.5, 3/4
regex:PATTERN    the last match, of the pattern's first group where it has one
text             the whole reply
math-verify      the last formula or number, equal as mathematics (needs the package math-verify)
package.module:name    an object of yours, or what makes one: see `Extractor`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol


class Found(NamedTuple):
    """An answer, and where it stands: text[start:end], whose tokens are the answer's."""

    answer: str
    start: int
    end: int


class Extractor(Protocol):
    """Finds answers. A tuple will do for `Found`."""

    def find(self, text: str) -> tuple[str, int, int] | None:
        """The answer of a reply; None: it holds none."""
        ...

    def same(self, a: str, b: str) -> bool:
        """Whether two answers are the same; `b` may be the right one as a file of problems has it."""
        ...

    def complete(self, text: str) -> bool:
        """Whether a reply so far holds its answer, whatever may follow, so that its generation can end."""
        ...


class Boxed:
    """The last \\boxed{...} of a reply; answers are the same as text without white space, or as numbers."""

    _OPEN = re.compile(r"\\boxed\s*\{")

    def find(self, text: str) -> Found | None:
        for opened in reversed(list(self._OPEN.finditer(text))):
            end = closing_brace(text, opened.end())
            if end is not None and text[opened.end() : end].strip():
                return _stripped(text, opened.end(), end)
        return None

    def same(self, a: str, b: str) -> bool:
        return _same_value(_content(self, a), _content(self, b))

    def complete(self, text: str) -> bool:
        return self.find(text) is not None


class LastNumber:
    """The last number of a reply, with its sign, thousands separators, decimals, exponent or denominator; numbers are
    the same by value."""

    # A digit behind a letter is part of a name (x2), and a minus behind an operand is no sign (5-3).
    _DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?|\.[0-9]+"
    _NUMBER = re.compile(rf"(?:(?<![\w)\]}}.])[-+−])?(?<![0-9A-Za-z_])(?:{_DIGITS})(?:\s?/\s?(?:{_DIGITS}))?")

    def find(self, text: str) -> Found | None:
        found = None
        for found in self._NUMBER.finditer(text):  # noqa: B007
            pass
        return found and Found(found.group(), found.start(), found.end())

    def same(self, a: str, b: str) -> bool:
        return _same_value(_content(self, a), _content(self, b))

    def complete(self, text: str) -> bool:
        return False  # another number may follow


class Pattern:
    """The last match of a regular expression, of its first group where it has one; answers are compared as text."""

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"extractor must have a valid pattern, was {pattern!r}: {error}") from error

    def find(self, text: str) -> Found | None:
        group = min(self._pattern.groups, 1)
        matches = [match for match in self._pattern.finditer(text) if (match.group(group) or "").strip()]
        return _stripped(text, *matches[-1].span(group)) if matches else None

    def same(self, a: str, b: str) -> bool:
        return _same_text(a, b)

    def complete(self, text: str) -> bool:
        return False


class WholeText:
    """The whole reply, without the white space around it."""

    def find(self, text: str) -> Found | None:
        return _stripped(text, 0, len(text)) if text.strip() else None

    def same(self, a: str, b: str) -> bool:
        return _same_text(a, b)

    def complete(self, text: str) -> bool:
        return False


class MathVerify:
    """What the package math-verify finds in a reply (a box, else a formula or a number); answers are the same if they
    are equal as mathematics. For the main thread alone: its time limits are signals."""

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ImportError("the extractor math-verify needs a package: pip install math-verify") from error
        self._parse: Callable[[str], list[Any]] = lru_cache(4096)(math_verify.parse)
        self._verify: Callable[[Any, Any], bool] = math_verify.verify
        self._boxed = Boxed()
        self.same = lru_cache(4096)(self._same)

    def find(self, text: str) -> Found | None:
        if found := self._boxed.find(text):
            return found
        parsed = self._parse(text)
        if not parsed:
            return None
        answer = parsed[-1] if isinstance(parsed[-1], str) else str(parsed[-1])  # the text comes last
        start = text.rfind(answer)
        return Found(answer, start, start + len(answer)) if start >= 0 else _stripped(text, 0, len(text))

    def complete(self, text: str) -> bool:
        return self._boxed.complete(text)

    def _same(self, a: str, b: str) -> bool:
        if _same_text(a, b):
            return True
        ours, its = self._value(a), self._value(b)
        # The first is taken for the right one, whose form decides in some cases; here neither is.
        return bool(ours and its) and (self._verify(ours, its) or self._verify(its, ours))

    def _value(self, answer: str) -> list[Any]:
        """As mathematics. LaTeX is read as such between dollars only."""
        return self._parse(f"${_content(self._boxed, answer)}$") or self._parse(answer)


_BUILT_IN: dict[str, Callable[[], Extractor]] = {
    "boxed": Boxed,
    "last-number": LastNumber,
    "text": WholeText,
    "math-verify": MathVerify,
}


def by_name(name: str) -> Extractor:
    """The extractor of a name; the module's docstring lists them.

    Raises ValueError for a name that is none, ImportError where a package or a module of yours is missing, TypeError
    for an object that is no extractor.
    """
    if name.startswith("regex:"):
        return Pattern(name.removeprefix("regex:"))
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    module, separator, attribute = name.partition(":")
    if not separator or not attribute:
        known = ", ".join([*_BUILT_IN, "regex:PATTERN", "package.module:name"])
        raise ValueError(f"extractor must be one of {known}, was {name!r}")
    try:
        imported = import_module(module)
    except ImportError as error:
        raise ImportError(f"extractor {name!r} cannot be imported ({error}): is its folder in PYTHONPATH?") from error
    except Exception as error:
        raise ValueError(f"extractor {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(imported, attribute):
        raise ValueError(f"extractor must name something in {module}, which has no {attribute}")
    made = getattr(imported, attribute)
    if isinstance(made, type) or (callable(made) and not hasattr(made, "find")):
        try:
            made = made()
        except Exception as error:
            raise ValueError(f"extractor {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if missing := [method for method in ("find", "same", "complete") if not callable(getattr(made, method, None))]:
        raise TypeError(f"extractor must have find, same and complete, {name!r} has no {missing[0]}")
    return made


def name_of(extractor: Extractor | str) -> str:
    """What a file's header calls an extractor."""
    if isinstance(extractor, str):
        return extractor
    return f"{type(extractor).__module__}:{type(extractor).__qualname__}"


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` is closed; escaped braces do not count. None: nowhere."""
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 1  # and what it escapes
        elif text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if not depth:
                return at
        at += 1
    return None


def _stripped(text: str, start: int, end: int) -> Found:
    part = text[start:end]
    start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
    return Found(text[start:end], start, end)


def _content(extractor: Boxed | LastNumber, answer: str) -> str:
    """The answer in a right one that a file gives as a whole solution: "#### 42" or "\\boxed{42}"."""
    found = extractor.find(answer)
    return found.answer if found else answer


def _same_text(a: str, b: str) -> bool:
    return "".join(a.split()) == "".join(b.split())


def _same_value(a: str, b: str) -> bool:
    if _same_text(a, b):
        return True
    ours = _value(a)
    return ours is not None and ours == _value(b)


def _value(number: str) -> Fraction | None:
    """None for what is no number, or has more digits than Python reads."""
    if not LastNumber._NUMBER.fullmatch(number.strip()):
        return None
    above, _, below = "".join(number.split()).replace(",", "").replace("−", "-").partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
