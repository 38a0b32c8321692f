"""Build, test and measure the package on this machine's NVIDIA GPU: offline, in under nine minutes.

    python3 benchmarks/gpu.py                          # every part
    python3 benchmarks/gpu.py --parts tests,step_ops   # some
    python3 benchmarks/gpu.py --resume                 # those that have not passed yet

It uses the Python that runs it, with the torch that is there, and installs nothing. Each part has a time limit of its
own; when one fails the others still run. After each part its results are in benchmarks/results/<gpu>.json
(benchmarks/README.md), beside those that other runs of the same commit have left there.
Exit status: 0 all parts that were asked for have passed, 1 one has not, or the file is not as its schema has it, 2
there is no GPU or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

from benchmarks import results_file

ROOT = results_file.ROOT
LOGS = ROOT / "build" / "gpu"
RESULTS = results_file.FOLDER
TIME_LIMIT = 520  # seconds, all parts together; ten more are left for ending the last one, and ten for the questions
GRACE = 10  # seconds that an interrupted part has to report what it found; pytest does
TAIL = 40  # lines of a failed part's log that are shown
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH")))),
    "SPECEXIT_CUDA": "1",  # without nvcc the build part must fail
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",  # of each of the tests' processes, which make and check their inputs on the CPU
}


@dataclass(frozen=True)
class Part:
    """One step of the run.

    command  run in the root of the repository
    limit    seconds
    read     reads the result that the command left in a file; raises when it is not there, or is something else
    """

    command: Sequence[str]
    limit: float
    read: Callable[[], Any] | None = None


def count_tests() -> dict[str, int]:
    """Passed, failed and skipped tests. Raises ValueError where none passed: if all skip, nothing was tried."""
    suites = list(ET.parse(LOGS / "tests.xml").iter("testsuite"))

    def total(name: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in suites)

    failed, skipped = total("failures") + total("errors"), total("skipped")
    passed = total("tests") - failed - skipped
    if passed == 0:
        raise ValueError(f"no test passed: {failed} failed, {skipped} skipped")
    return {"passed": passed, "failed": failed, "skipped": skipped}


def read_json(name: str) -> Any:
    """What a part has written to build/gpu/<name>.json."""
    return json.loads((LOGS / f"{name}.json").read_text())


def read_benchmark(name: str) -> Any:
    """The report of a benchmark. Raises ValueError where ours has a time in no cell."""
    report = read_json(name)
    if not any("microseconds" in result for cell in report["cells"] for result in cell["results"][:1]):
        raise ValueError("no cell has a time")
    return report


def script(name: str, file: str, limit: float, read: Callable[[str], Any]) -> Part:
    """The part that runs a script of this folder, which writes its report with --json."""
    return Part((sys.executable, f"benchmarks/{file}", f"--json={LOGS / name}.json"), limit, partial(read, name))


# The limits leave 30 s of TIME_LIMIT, for ending three parts that run into theirs. What Triton and Inductor compile
# stays in their caches, which nothing here empties.
PARTS = {
    "build": Part((sys.executable, "setup.py", "build_ext", "--inplace"), 50),
    "tests": Part(  # in eight processes: most of the time goes into compiling kernels
        (sys.executable, "-m", "pytest", "tests/gpu", "-n", "8", f"--junitxml={LOGS / 'tests.xml'}"), 140, count_tests
    ),
    "sanitizer": script("sanitizer", "sanitize.py", 40, read_json),
    "tree_attention": script("tree_attention", "bench_tree_attention.py", 55, read_benchmark),
    "draft_head": script("draft_head", "bench_draft_head.py", 40, read_benchmark),
    "step_ops": script("step_ops", "bench_step_ops.py", 30, read_benchmark),
    "step": script("step", "bench_step.py", 60, read_benchmark),
    "scaling": script("scaling", "bench_scaling.py", 40, read_benchmark),
    "end_to_end": script("end_to_end", "bench_end_to_end.py", 35, read_json),
}


def run(name: str, part: Part, limit: float) -> dict[str, Any]:
    """Run one part, its output going to build/gpu/<name>.out and .err.

    Returns its status ("passed", "failed" or "timed out"), seconds, and what it reported as `result`.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    for old in LOGS.glob(f"{name}.*"):  # an earlier run's report must not be read as this one's
        old.unlink()
    out, err = LOGS / f"{name}.out", LOGS / f"{name}.err"
    print(f"{name}: {' '.join(part.command)}", flush=True)
    start = time.monotonic()
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=ENVIRONMENT, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            status = "failed" if process.wait(timeout=limit) else "passed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if process.returncode is None:  # also where this run is cut off
                end(process)
    report: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if part.read:
        try:
            report["result"] = part.read()
        except (OSError, ValueError, LookupError, TypeError, ET.ParseError) as error:
            if status != "timed out":  # which may have left a result, but need not
                report |= {"status": "failed", "error": f"no result: {error}"}
    if report["status"] != "passed":
        lines = [*out.read_text().splitlines()[-TAIL:], *err.read_text().splitlines()[-TAIL:]]
        print("\n".join(f"  {line}" for line in lines), flush=True)
    return report


def end(process: subprocess.Popen[Any]) -> None:
    """End a part with its children (nvcc, cmake, test workers), after a chance to write its report."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)
    with suppress(ProcessLookupError):  # all are gone
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot be killed
        process.wait(timeout=GRACE)


def run_all(names: Sequence[str], parts: dict[str, Part], time_limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the parts in order, each within its own limit and what is left of `time_limit` seconds; a part's name and
    report as soon as it ends."""
    deadline = time.monotonic() + time_limit
    for name in names:
        left = deadline - time.monotonic()
        if left > 0:
            yield name, run(name, parts[name], min(parts[name].limit, left))
        else:
            yield name, {"status": "timed out", "seconds": 0.0, "error": "no time was left for it"}


def table(results: results_file.Results, ran: Sequence[str]) -> str:
    """One line a part: status, seconds, what the tests counted, and of those not in `ran` when they ran."""
    lines = [f"{'part':<16}{'status':<11}{'seconds':>8}"]
    for name in filter(results["parts"].get, PARTS):
        part = results["parts"][name]
        counts = results_file.report_of(results, name) if name == "tests" else None
        detail = ", ".join(f"{n} {what}" for what, n in counts.items()) if counts else part.get("error", "")
        when = "" if name in ran else f"ran at {part['date']}"
        detail = "; ".join(filter(None, (detail, when)))
        lines.append(f"{name:<16}{part['status']:<11}{part['seconds']:>8.1f}  {detail}".rstrip())
    return "\n".join(lines)


def answer(*command: str) -> str | None:
    """What a short command prints; None where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def package_environment() -> Any:
    """`specexit_kernels.environment()` in a process of its own, which sees the module just built; None if it fails."""
    output = answer(sys.executable, "-c", "import json, specexit_kernels as s; print(json.dumps(s.environment()))")
    return json.loads(output) if output else None


def working_tree() -> str | None:
    """The commit that is checked out, with `-dirty-` and a digest where tracked files differ; None outside of git."""
    commit = answer("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    made = (":(exclude)benchmarks/results", ":(exclude)benchmarks/RESULTS.md")  # by the runs themselves
    changes = answer("git", "diff", "HEAD", "--binary", "--", ".", *made)
    return f"{commit}-dirty-{hashlib.sha256(changes.encode()).hexdigest()[:12]}" if changes else commit


def identity(commit: str | None) -> dict[str, str | None]:
    """What the results will be of: the first GPU, the driver, versions, `commit` or else the one that is checked out.

    Raises RuntimeError where torch sees no GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"{sys.executable} has no torch ({error}); name another with PYTHON=") from error
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} of {sys.executable} sees none")
    triton = None
    with suppress(metadata.PackageNotFoundError):
        triton = metadata.version("triton")
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": str(torch.__version__),
        "triton": triton,
        "commit": commit or working_tree(),
    }


def passed(results: results_file.Results, name: str) -> bool:
    """Whether a part has passed. What a build has left can be gone: the file may come from another machine."""
    part = results["parts"].get(name, {})
    return part.get("status") == "passed" and (name != "build" or any(ROOT.glob("specexit_kernels/_C.*.so")))


def violations(results: results_file.Results) -> list[str]:
    """What the file has against its schema, which a machine without jsonschema cannot say."""
    try:
        return results_file.violations(results)
    except ImportError:
        print("not compared with results.schema.json: jsonschema is not installed")
        return []


def main() -> int:
    """Run the parts that are asked for, write the results after each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="only those that have not passed yet, of this commit")
    parser.add_argument("--commit", help="what is measured, 40 hex digits, where this is no git checkout")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts must be of {', '.join(PARTS)}, was {', '.join(unknown)}")
    if arguments.commit and not results_file.COMMIT.fullmatch(arguments.commit):
        parser.error(f"--commit must be 40 hex digits, perhaps with -dirty, was {arguments.commit}")
    try:
        measured = identity(arguments.commit)
    except RuntimeError as error:
        print(f"an NVIDIA GPU is needed: {error}", file=sys.stderr)
        return 2

    if measured["commit"] is None:
        if arguments.resume:
            parser.error("--resume needs --commit where this is no git checkout")
        print("the commit is not known (--commit): results of an earlier run are dropped", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the part that runs then ends too
    path = results_file.path_of(str(measured["gpu"]), RESULTS)
    results = results_file.begin(measured, path)
    todo = [name for name in names if not (arguments.resume and passed(results, name))]
    environment = None
    for name, report in run_all(todo, PARTS, TIME_LIMIT):
        if environment is None or name == "build":  # which makes the native module
            environment = package_environment()
        results["environment"] = environment
        results_file.record(results, name, report, datetime.now(UTC).isoformat(timespec="seconds"))
        results_file.save(results, path)
    print(f"\n{measured['gpu']}, commit {measured['commit']}: {path}\n{table(results, todo)}")
    wrong = violations(results) if todo else []
    print("".join(f"against results.schema.json: {line}\n" for line in wrong), end="")
    return int(bool(wrong) or any(results["parts"][name]["status"] != "passed" for name in names))


if __name__ == "__main__":
    sys.exit(main())
