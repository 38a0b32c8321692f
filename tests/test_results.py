"""benchmarks/results_file.py and results_page.py: the schema, the committed files, and the page on made-up ones."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
from scripts import load_script, run_script

MADE_UP = "GPU THAT DOES NOT EXIST"
TORCH = "0.0.0"
DATE = "2001-01-01T00:00:00+00:00"
SHAPES: dict[str, dict[str, Any]] = {
    "tree_attention": {
        **dict.fromkeys(("heads", "kv_heads", "head_dim"), 8),
        "softcap": None,
        "sinks": False,
        "window": None,
        "model": "m",
        "nodes": 60,
        "batch": 1,
        "length": 4096,
    },
    "draft_head": {"op": "level", "model": "m", "hidden": 8, "vocabulary": 9, "batch": 1, "k": 10, "rows": 10},
    "step_ops": {
        "op": "accept",
        "model": "m",
        "batch": 1,
        "nodes": 60,
        "candidates": 510,
        "depth": 6,
        "sampling": None,
    },
    "step": {"model": "m", "batch": 1, "length": 4096, "nodes": 60, "depth": 6, "top_k": 10, "accepted": 4},
}
SHAPES["scaling"] = SHAPES["step"] | {"batch": 1000}


@pytest.fixture(scope="module")
def file():
    return load_script("results_file")


@pytest.fixture(scope="module")
def page():
    return load_script("results_page")


def timed(implementation: str, microseconds: float, ours: float | None = 10.0, **more: Any) -> dict[str, Any]:
    """A result, as a harness would have it at 1 TB/s of 5 MB."""
    return {
        "implementation": implementation,
        "microseconds": microseconds,
        "spread": [microseconds, microseconds],
        "samples": 3,
        "calls": 64,
        "method": "graph",
        "note": "",
        "error": 0.0,
        "bytes_per_second": 5e6 / microseconds * 1e6,
        "flops_per_second": 0.0,
        "fraction_of_floor": 5 / microseconds,
        "times_ours": microseconds / ours if ours else None,
        **more,
    }


def cell(part: str, *results: dict[str, Any]) -> dict[str, Any]:
    measured = {"bytes": 5000000, "flops": 0, "floor_microseconds": 5.0, "limit": "memory"}
    return {**SHAPES[part], **measured, "results": list(results)}


def report(*cells: dict[str, Any]) -> dict[str, Any]:
    ceilings = {"bytes_per_second": 1e12, "flops_per_second": 2e12}
    return {
        "device": MADE_UP,
        "dtype": "bfloat16",
        "torch": TORCH,
        "ours": "ours",
        "ceilings": ceilings,
        "cells": list(cells),
    }


def mode(seconds: float, thinking_tokens: int = 600) -> dict[str, Any]:
    return {
        "accuracy": 1.0,
        "thinking_tokens": thinking_tokens,
        "new_tokens": 700,
        "steps": 70,
        "tokens_per_step": 10.0,
        "seconds": seconds,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """A file in which all went well."""
    passed = {"status": "passed", "seconds": 12.3, "date": DATE}
    names = ("build", "tests", "sanitizer", *SHAPES, "end_to_end")
    ours, peer = timed("ours", 10.0), timed("peer", 25.0)
    parts = {"base": 7.5, "draft": 2.0}
    other = {**cell("tree_attention", ours), "model": "n", "length": 8192}
    step = cell("step", ours | {"launches": 12, "syncs": 0, "parts": parts, "tokens_per_second": 4321.0}, peer)
    return {
        "gpu": MADE_UP,
        "driver": "0.0",
        "torch": TORCH,
        "triton": None,
        "commit": "0123456789" * 4,
        "date": DATE,
        "environment": None,
        "parts": {name: dict(passed) for name in names},
        "correctness": {"passed": 90, "failed": 0, "skipped": 1},
        "sanitizer": {
            **dict.fromkeys(("memcheck", "racecheck", "synccheck"), "nothing found"),
            "initcheck": "unavailable: |",
        },
        "ops": {
            "tree_attention": report(cell("tree_attention", ours, peer), other),
            "draft_head": report(cell("draft_head", ours, peer)),
            "step_ops": report(cell("step_ops", ours, peer)),
        },
        "step": report(step),
        "scaling": report(cell("scaling", ours)),
        "end_to_end": {
            "problems": 6,
            "device": MADE_UP,
            "dtype": "float32",
            "torch": TORCH,
            "batch_size": 1,
            "threads": 1,
            "tree": {},
            "exit": {},
            "identical_text": True,
            "modes": {"autoregressive": mode(8.0), "speculative": mode(4.0), "specexit": mode(2.0, 150)},
        },
    }


def test_the_committed_page_is_made_of_the_committed_files(file, page):
    files = [json.loads(path.read_text()) for path in sorted(file.FOLDER.glob("*.json"))]
    assert [file.violations(results) for results in files] == [[]] * len(files)
    assert page.PAGE.read_text() == page.page(files), "run `make results`"


def test_without_files_there_is_no_result(page):
    assert page.page([]).endswith("\n\nNo GPU has produced a result yet.\n")


def test_writes_the_page(file, page, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(page.results_file, "FOLDER", tmp_path)
    file.save(results, tmp_path / "a.json")
    assert run_script(page, monkeypatch) == 0
    assert page.PAGE.read_text() == page.page([results])
    file.save({**results, "driver": 5}, tmp_path / "b.json")
    page.PAGE.unlink()
    assert run_script(page, monkeypatch) == 1
    assert "b.json: $.driver: 5 is not of type" in capsys.readouterr().err
    assert not page.PAGE.exists()


def test_the_page_has_all_that_was_measured(page, results):
    lines = page.page([results]).splitlines()
    for line in (
        f"## {MADE_UP}",
        f"| 0.0 | 0.0.0 |  | {'0123456789' * 4} | {DATE} |",
        "| tests | passed | 12.3 | 90 passed, 0 failed, 1 skipped |",
        "| sanitizer | passed | 12.3 | memcheck, racecheck, synccheck: nothing found; initcheck: unavailable: \\| |",
        "| model | length | floor | limit | ours | of floor | peer |",
        "| m | 4,096 | 5.00 | memory | 10.00 | 50% | 25.00 (2.50x) |",
        "| n | 8,192 | 5.00 | memory | 10.00 | 50% |  |",
        "| op | floor | limit | ours | of floor | peer |",
        "| level | 5.00 | memory | 10.00 | 50% | 25.00 (2.50x) |",
        "| accept | 5.00 | memory | 10.00 | 50% | 25.00 (2.50x) |",
        "| model | implementation | launches | syncs | tokens per second |",
        "| m | ours | 12 | 0 | 4,321 |",
        "| model | implementation | base | draft |",
        "| m | ours | 7.50 | 2.00 |",
        "A step of ours is taken to publish the tokens under *accepted*: that is assumed, not measured.",
        "| `generate` | 100.0% | 100.0 | 10.00 | 8.00 | 1.00x |",
        "| speculative + exit | 100.0% | 25.0 | 10.00 | 2.00 | 4.00x |",
    ):
        assert line in lines, line
    for same in (
        "nodes 60, batch 1",
        "model m, batch 1, k 10",
        "batch 1,000, length 4,096, nodes 60",
    ):
        assert any(f" In all cells: {same}" in line for line in lines), same


def test_every_table_is_whole(page, results):
    rows = [line.replace("\\|", "") for line in page.page([results]).splitlines()]
    for above, row in pairwise(rows):
        if above.startswith("|") and row.startswith("|"):
            assert above.count("|") == row.count("|"), row


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"parts": {"tests": None}, "correctness": None}, "the tests did not run"),
        ({"parts": {"tests": {"status": "timed out"}}, "correctness": None}, "the tests timed out"),
        ({"parts": {"tests": {"status": "failed"}}, "correctness": {"failed": 3}}, "3 tests failed"),
        ({"correctness": {"failed": 2}}, "2 tests failed"),
        ({"parts": {"build": {"status": "failed"}}}, "the build failed"),
        ({"sanitizer": {"racecheck": "found something"}}, "racecheck found something"),
        (
            {"parts": {"tests": {"status": "failed"}}, "sanitizer": {"memcheck": "failed"}},
            "the tests failed; memcheck failed",
        ),
    ],
)
def test_what_is_not_found_right_has_no_speed(file, page, results, change, why):
    merge(results, change)
    assert file.violations(results) == []
    text = page.page([results])
    assert text.endswith(f"\n**No speed is shown: {why}.**\n")
    assert not any(word in text for word in ("µs", "2.50x", "4.00x", "TB/s"))


@pytest.mark.parametrize("status", [None, "failed", "timed out"])
def test_a_sanitizer_that_has_said_nothing_does_not_withhold_speed(page, results, status):
    merge(results, {"parts": {"sanitizer": status and {"status": status, "error": "it has ended"}}, "sanitizer": None})
    text = page.page([results])
    assert "2.50x" in text
    assert not status or f"| sanitizer | {status} | 12.3 | it has ended |" in text


def merge(target: dict[str, Any], change: dict[str, Any]) -> None:
    """Nested changes; None takes a key away."""
    for key, value in change.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


def test_what_has_no_time_says_why(file, page, results):
    wrong = {"implementation": "ours", "unavailable": "wrong result: 5 of 9"}
    slow = timed("peer", 25.0, None, note="no graph: it\nasks", method="events")
    absent = {"implementation": "other", "unavailable": "not installed"}
    results["ops"] = {"tree_attention": report(cell("tree_attention", wrong, slow, absent))}
    results["ops"]["tree_attention"]["cells"].append(cell("tree_attention", timed("ours", 10.0), absent))
    for name in ("draft_head", "step_ops"):
        del results["parts"][name]
    assert file.violations(results) == []
    lines = page.page([results]).splitlines()
    start = lines.index("| m | 5.00 | memory | none [1] |  | 25.00 [2] | none [3] |")
    assert lines[start + 1 : start + 6] == [
        "| m | 5.00 | memory | 10.00 | 50% |  | none [3] |",
        "",
        "- [1] `ours`: wrong result: 5 of 9",
        "- [2] `peer`: no graph: it asks; launched from Python",
        "- [3] `other`: not installed",
    ]


def test_other_text_end_to_end_has_no_speed(file, page, results):
    end_to_end = results["end_to_end"]
    end_to_end |= {"identical_text": False, "unavailable": "other text than generate's: x differs"}
    results["parts"]["end_to_end"]["status"] = "failed"
    (line,) = file.violations(results)
    assert line.startswith("$.end_to_end: False schema")
    del end_to_end["modes"]
    assert file.violations(results) == []
    assert page.page([results]).endswith("\n### End to end\n\nNo speed: other text than generate's: x differs.\n")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"gpu": None}, "'gpu' is a required property"),
        ({"speed": 5}, "('speed' was unexpected)"),
        ({"commit": "abc"}, "$.commit: 'abc' does not match"),
        ({"commit": "0" * 40 + "-dirty-00"}, "$.commit"),
        ({"date": "yesterday"}, "$.date"),
        ({"correctness": {"passed": 0}}, "$.correctness.passed: 0 is less than the minimum"),
        ({"sanitizer": {"memcheck": "fine"}}, "$.sanitizer.memcheck"),
        ({"sanitizer": {"memcheck": None}}, "'memcheck' is a required property"),
        ({"parts": {"demo": {"status": "passed", "seconds": 1, "date": DATE}}}, "$.parts: 'demo' is not one of"),
        ({"parts": {"tests": {"status": "fine"}}}, "$.parts.tests.status: 'fine' is not one of"),
        ({"ops": {"tree_attention": {"device": "cpu"}}}, "tree_attention: device is cpu, of the file " + MADE_UP),
        ({"step": {"torch": "9"}}, "step: torch is 9, of the file 0.0.0"),
        ({"step": None}, "step: has passed, and has no report"),
        ({"parts": {"step": None}}, "step: has a report, and did not run"),
        ({"end_to_end": {"modes": {"specexit": {"seconds": 0}}}}, "$.end_to_end.modes.specexit.seconds"),
        ({"end_to_end": {"modes": None}}, "$.end_to_end: 'modes' is a required property"),
    ],
)
def test_a_file_of_another_form_is_found(file, results, change, where):
    assert file.violations(results) == []
    merge(results, change)
    (line,) = file.violations(results)
    assert where in line


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"microseconds": None}, "'microseconds' is a required property"),
        ({"microseconds": "9"}, "results[0].microseconds: '9' is not of type 'number'"),
        ({"spread": [1.0]}, "results[0].spread: [1.0] is too short"),
        ({"method": "guess"}, "results[0].method"),
        ({"parts": {"base": "much"}}, "results[0].parts.base"),
        ({"more": [1]}, "results[0].more: [1] is not of type"),
        ({"unavailable": "wrong result"}, "results[0]: Additional properties are not allowed"),
    ],
)
def test_a_result_of_another_form_is_found(file, change, where):
    result = timed("ours", 10.0, parts={})
    merge(result, change)
    (line,) = file.violations(report(cell("step", result)), "step")
    assert where in line


@pytest.mark.parametrize("part", SHAPES)
def test_a_cell_has_its_shape(file, part):
    right = report(cell(part, timed("ours", 10.0)))
    assert file.violations(right, part) == []
    for key in (SHAPES[part].keys() - {"accepted"}) | {"floor_microseconds", "limit", "results"}:
        wrong = copy.deepcopy(right)
        del wrong["cells"][0][key]
        assert file.violations(wrong, part) == [f"$.cells[0]: '{key}' is a required property"]


def test_a_file_goes_on_only_where_it_is_of_the_same(file, results, tmp_path):
    path = file.path_of("NVIDIA H200", tmp_path)
    assert path == tmp_path / "nvidia-h200.json"
    same = {key: results[key] for key in file.IDENTITY}
    new = {**same, "parts": {}}
    assert file.begin(same, path) == new
    path.write_text('{"gpu": ')
    assert file.begin(same, path) == new
    file.save(results, path)
    assert file.begin(same, path) == results
    for key in file.IDENTITY:
        assert file.begin({**same, key: "other"}, path) == {**new, key: "other"}
    for commit, goes_on in ((None, False), ("0" * 40 + "-dirty", False), ("0" * 40 + "-dirty-" + "1" * 12, True)):
        file.save({**results, "commit": commit}, path)
        assert (file.begin({**same, "commit": commit}, path)["parts"] == results["parts"]) == goes_on


def test_a_part_replaces_its_earlier_outcome(file, results, tmp_path):
    path = tmp_path / "file.json"
    later = DATE.replace("2001", "2002")
    file.record(results, "step_ops", {"status": "failed", "seconds": 1.0, "error": "no result"}, later)
    assert results["parts"]["step_ops"] == {"status": "failed", "seconds": 1.0, "error": "no result", "date": later}
    assert list(results["ops"]) == ["tree_attention", "draft_head"]
    assert (results["date"], results["parts"]["step"]["date"]) == (later, DATE)
    counts = {"passed": 1, "failed": 0, "skipped": 0}
    file.record(results, "tests", {"status": "passed", "seconds": 1.0, "result": counts}, later)
    assert results["correctness"] == file.report_of(results, "tests") == counts
    for name in ("tree_attention", "draft_head"):
        file.record(results, name, {"status": "timed out", "seconds": 1.0}, later)
    file.save(results, path)
    saved = json.loads(path.read_text())
    assert "ops" not in saved
    assert [key for key in file.ORDER if key in saved] == list(saved)
    assert file.violations(saved) == []
    assert list(tmp_path.iterdir()) == [path]


def test_the_schema_is_one(file):
    import jsonschema

    schema = json.loads(file.SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]) == set(file.ORDER)
    assert schema["properties"]["parts"]["propertyNames"]["enum"] == ["build", *file.PLACES]
