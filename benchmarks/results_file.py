"""benchmarks/results/<gpu>.json: one GPU's results of one commit, whose parts may come from several runs.

results.schema.json is the file's form. Without that check this module needs the standard library alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Results = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
SCHEMA = ROOT / "benchmarks" / "results.schema.json"

# Where the report of a part stands; `build` has none.
PLACES: dict[str, tuple[str, ...]] = {
    "tests": ("correctness",),
    "sanitizer": ("sanitizer",),
    "tree_attention": ("ops", "tree_attention"),
    "draft_head": ("ops", "draft_head"),
    "step_ops": ("ops", "step_ops"),
    "step": ("step",),
    "scaling": ("scaling",),
    "end_to_end": ("end_to_end",),
}
# Results in which one of these differs are not compared, so they never share a file.
IDENTITY = ("gpu", "driver", "torch", "triton", "commit")
ORDER = (*IDENTITY, "date", "environment", "correctness", "sanitizer", "ops", "step", "scaling", "end_to_end", "parts")
COMMIT = re.compile(r"[0-9a-f]{40}(-dirty(-[0-9a-f]{12})?)?")


def path_of(gpu: str, folder: Path) -> Path:
    """The file of a GPU: nvidia-h200.json."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def begin(identity: Mapping[str, str | None], path: Path) -> Results:
    """The results in `path` where they are of the same commit, driver and versions; else none yet.

    identity  the values of IDENTITY

    Of an unknown commit nothing is known to be the same, and of changes without a digest neither.
    """
    try:
        results: Results = json.loads(path.read_text())
        same = all(results[key] == identity[key] for key in IDENTITY)
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    commit = identity["commit"]
    if same and commit and not commit.endswith("-dirty"):
        return results
    return {**identity, "parts": {}}


def record(results: Results, part: str, outcome: Mapping[str, Any], date: str) -> None:
    """Put a part's outcome in the place of its earlier one: status, seconds, perhaps error, perhaps the report as
    `result`."""
    outcome = dict(outcome)
    report = outcome.pop("result", None)
    results["parts"][part] = {**outcome, "date": date}
    results["date"] = date
    if part not in PLACES:
        return
    *above, key = PLACES[part]
    for name in above:
        results = results.setdefault(name, {})
    results.pop(key, None)
    if report is not None:
        results[key] = report


def report_of(results: Results, part: str) -> Any:
    """What the part reported; None where it has left nothing."""
    found: Any = results
    for key in PLACES[part]:
        found = found.get(key)
        if found is None:
            return None
    return found


def save(results: Results, path: Path) -> None:
    """Write the results to their file, in the order of its keys."""
    path.parent.mkdir(exist_ok=True)
    write({key: results[key] for key in ORDER if key in results and (results[key] or key != "ops")}, path)


def write(value: Any, path: Path) -> None:
    """Write JSON so that whoever reads the file finds all of it, or what was there before."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def violations(results: Any, part: str | None = None) -> list[str]:
    """What a file, or the report of a part, has against the schema, a line each; of a file also where its reports are
    of another device or torch than it says. Raises ImportError where jsonschema is not installed."""
    import jsonschema

    schema = json.loads(SCHEMA.read_text())
    if part:
        schema = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}
    found = jsonschema.Draft202012Validator(schema).iter_errors(results)
    lines = [f"{error.json_path}: {error.message[:200]}" for error in found]
    return lines or ([] if part else list(_contradictions(results)))


def _contradictions(results: Results) -> Iterator[str]:
    for part in PLACES:
        report = report_of(results, part)
        outcome = results["parts"].get(part)
        if report is not None and outcome is None:
            yield f"{part}: has a report, and did not run"
        if report is None and outcome and outcome["status"] == "passed":
            yield f"{part}: has passed, and has no report"
        for key, value in (("device", results["gpu"]), ("torch", results["torch"])):
            if isinstance(report, dict) and report.get(key, value) != value:
                yield f"{part}: {key} is {report[key]}, of the file {value}"
