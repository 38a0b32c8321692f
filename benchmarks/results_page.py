"""RESULTS.md, made from results/*.json alone: tables for people, and no speed where correctness failed.

    python benchmarks/results_page.py    # or `make results`

Exit status: 0, or 1 where a file is not as results.schema.json has it; then nothing is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

from benchmarks import results_file
from benchmarks.results_file import Results, report_of

PAGE = results_file.ROOT / "benchmarks" / "RESULTS.md"
HEAD = """\
# Results

Made by `make results` from the files in `benchmarks/results`, which `make gpu` writes; not to be edited. The
[README](README.md) says what is measured, and how."""
NONE = "No GPU has produced a result yet."

# The title of a benchmark, and the keys that tell its cells apart; none: all that its cells have.
BENCHMARKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tree_attention": ("Tree attention", ("model", "nodes", "batch", "length")),
    "draft_head": ("The draft's head", ("op", "model", "batch", "k")),
    "step_ops": ("The step's small ops", ("op", "model", "batch", "nodes", "candidates", "sampling")),
    "step": ("A decode step", ()),
    "scaling": ("Scaling", ()),
}
MODES = {"autoregressive": "`generate`", "speculative": "speculative", "specexit": "speculative + exit"}
# The keys of every cell and of every result; the others are a cell's shape, and what a benchmark says besides.
CELL = {"bytes", "flops", "floor_microseconds", "limit", "results"}
RESULT = {"implementation", "unavailable", "microseconds", "spread", "samples", "calls", "method", "note", "error"}
RESULT |= {"bytes_per_second", "flops_per_second", "fraction_of_floor", "times_ours", "parts"}


def page(files: Iterable[Results]) -> str:
    """The page, a chapter for each file."""
    chapters = ["\n".join(_chapter(results)) for results in files]
    return "\n\n".join([HEAD, *(chapters or [NONE])]) + "\n"


def why_no_speed(results: Results) -> list[str]:
    """Why no time may be shown: what was not found to be right has no speed."""
    reasons = []
    status = {name: part["status"] for name, part in results["parts"].items()}
    if status.get("build", "passed") != "passed":
        reasons.append(f"the build {status['build']}")
    failed = (report_of(results, "tests") or {}).get("failed", 0)
    if failed or status.get("tests") != "passed":
        reasons.append(f"{failed} tests failed" if failed else f"the tests {status.get('tests', 'did not run')}")
    said = report_of(results, "sanitizer") or {}
    reasons += [f"{tool} {verdict}" for tool, verdict in said.items() if verdict in ("found something", "failed")]
    return reasons


def _chapter(results: Results) -> Iterator[str]:
    yield f"## {results['gpu']}\n"
    yield from _table(
        ("driver", "torch", "triton", "commit", "date"),
        [[_text(results[key]) for key in ("driver", "torch", "triton", "commit", "date")]],
    )
    yield ""
    parts = [[name, part["status"], f"{part['seconds']:,.1f}", _said(results, name)] for name, part in _parts(results)]
    yield from _table(("part", "status", "seconds", ""), parts, numbers=("seconds",))
    if reasons := why_no_speed(results):
        yield f"\n**No speed is shown: {'; '.join(reasons)}.**"
        return
    for part in BENCHMARKS:
        if report := report_of(results, part):
            yield from _benchmark(part, report)
    if report := report_of(results, "end_to_end"):
        yield from _end_to_end(report)


def _parts(results: Results) -> list[tuple[str, Any]]:
    """Those that ran, in the order in which they do."""
    return [(name, results["parts"][name]) for name in ("build", *results_file.PLACES) if name in results["parts"]]


def _said(results: Results, part: str) -> str:
    """What the tests counted, what the sanitizer's tools said, or why there is no report."""
    report = report_of(results, part) if part in ("tests", "sanitizer") else None
    if report is None:
        return _text(results["parts"][part].get("error"))
    if part == "tests":
        return ", ".join(f"{count} {what}" for what, count in report.items())
    tools: dict[str, list[str]] = {}
    for tool, verdict in report.items():
        tools.setdefault(verdict, []).append(tool)
    return _text("; ".join(f"{', '.join(names)}: {verdict}" for verdict, names in tools.items()))


def _benchmark(part: str, report: Any) -> Iterator[str]:
    """A row for each cell: its shape, the floor, ours, the peers."""
    title, keys = BENCHMARKS[part]
    cells = report["cells"]
    keys = keys or tuple(_union(cells, CELL))
    shape = [key for key in keys if len({cell[key] for cell in cells}) > 1] or keys[:1]
    same = ", ".join(f"{key} {_text(cells[0][key])}" for key in keys if key not in shape)
    peers = _union(({result["implementation"]: 0 for result in cell["results"][1:]} for cell in cells), ())
    notes = _Notes()
    rows = []
    for cell in cells:
        ours, others = cell["results"][0], {result["implementation"]: result for result in cell["results"][1:]}
        share = f"{ours['fraction_of_floor']:.0%}" if "microseconds" in ours else ""
        rows.append(
            [
                *(_text(cell[key]) for key in shape),
                _number(cell["floor_microseconds"]),
                cell["limit"],
                notes.time(ours),
                share,
                *(notes.time(others[peer]) if peer in others else "" for peer in peers),
            ]
        )
    rates = report["ceilings"]
    yield f"\n### {title}\n"
    yield (
        f"Medians in µs, {report['dtype']}; ours is `{report['ours']}`, and in brackets is how many times ours a peer"
        f" takes. The floor is that of the rates measured in the same run: {rates['bytes_per_second'] / 1e12:.2f} TB/s,"
        f" {rates['flops_per_second'] / 1e12:,.0f} TFLOP/s.{f' In all cells: {same}.' if same else ''}\n"
    )
    numbers = ("floor", "ours", "of floor", *peers)
    yield from _table((*shape, "floor", "limit", "ours", "of floor", *peers), rows, numbers)
    yield from notes.lines()
    yield from _besides(shape, cells)


def _besides(shape: Sequence[str], cells: Sequence[Any]) -> Iterator[str]:
    """What a benchmark says of its results besides their times: launches and so on, and the parts of a step."""
    names = [
        ([*(_text(cell[key]) for key in shape), result["implementation"]], result)
        for cell in cells
        for result in cell["results"]
    ]
    more = [(name, {key: result[key] for key in result if key not in RESULT}) for name, result in names]
    parts = [(name, result.get("parts") or {}) for name, result in names]
    assumed = "A step of ours is taken to publish the tokens under *accepted*: that is assumed, not measured."
    for title, found in ((assumed if "accepted" in cells[0] else "Besides:", more), ("Parts, in µs:", parts)):
        columns = _union((values for _, values in found), ())
        rows = [[*name, *(_text(values.get(key)) for key in columns)] for name, values in found if values]
        if rows:
            yield f"\n{title}\n"
            headings = [column.replace("_", " ") for column in columns]
            yield from _table((*shape, "implementation", *headings), rows, headings)


def _end_to_end(report: Any) -> Iterator[str]:
    yield "\n### End to end\n"
    if "unavailable" in report:
        yield f"No speed: {report['unavailable']}."
        return
    problems, plain = report["problems"], report["modes"]["autoregressive"]["seconds"]
    yield (
        f"The bundled pair on {problems} problems, batch {report['batch_size']}, {report['dtype']}. The speculative"
        " text is `generate`'s, token for token. Thinking tokens are a problem's mean, seconds the total.\n"
    )
    rows = [
        [
            title,
            f"{mode['accuracy']:.1%}",
            f"{mode['thinking_tokens'] / problems:,.1f}",
            f"{mode['tokens_per_step']:.2f}",
            f"{mode['seconds']:,.2f}",
            f"{plain / mode['seconds']:.2f}x",
        ]
        for title, mode in ((title, report["modes"][name]) for name, title in MODES.items())
    ]
    numbers = ("accuracy", "thinking tokens", "tokens a step", "seconds", "speed-up")
    yield from _table(("mode", *numbers), rows, numbers)


class _Notes:
    """The notes below a table, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def time(self, result: Any) -> str:
        """The entry of a result: its time, over ours where it is a peer's, and the number of its note; why it has no
        time is a note too."""
        if "unavailable" in result:
            return f"none {self._mark(result, result['unavailable'])}"
        launched = "launched from Python" if result["method"] == "events" else ""
        ratio = result["times_ours"]
        return " ".join(
            filter(
                None,
                (
                    _number(result["microseconds"]),
                    f"({ratio:.2f}x)" if ratio not in (None, 1) else "",
                    self._mark(result, "; ".join(filter(None, (result["note"], launched)))),
                ),
            )
        )

    def _mark(self, result: Any, text: str) -> str:
        if not text:
            return ""
        line = f"`{result['implementation']}`: {' '.join(text.split())}"
        if line not in self.texts:
            self.texts.append(line)
        return f"[{self.texts.index(line) + 1}]"

    def lines(self) -> list[str]:
        return ["", *(f"- [{number}] {text}" for number, text in enumerate(self.texts, 1))] if self.texts else []


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> Iterator[str]:
    """`numbers` are the headings of columns that are aligned on the right."""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'|'.join('---:' if heading in numbers else '---' for heading in headings)}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _union(mappings: Iterable[Any], without: Collection[str]) -> list[str]:
    """The keys of all, in the order in which they appear first."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping if key not in without))


def _text(value: Any) -> str:
    """A value as an entry of a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).split()).replace("|", "\\|")


def _number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def main() -> int:
    """Write the page."""
    files = {path: json.loads(path.read_text()) for path in sorted(results_file.FOLDER.glob("*.json"))}
    wrong = [f"{path}: {line}" for path, results in files.items() for line in results_file.violations(results)]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    PAGE.write_text(page(files.values()))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
