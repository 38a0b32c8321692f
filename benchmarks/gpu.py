"""Build, test and try the package on this machine's NVIDIA GPU: offline, in under nine minutes.

    python3 benchmarks/gpu.py --parts build,tests,sanitizer,tree_attention,draft_head,step_ops,demo

It uses the Python that runs it, with the torch that is there, and installs nothing. Each part has a time limit of its
own; when one fails the others still run. The results go to benchmarks/results/<gpu>.json (benchmarks/README.md).
Exit status: 0 all parts passed, 1 one did not, 2 there is no GPU or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
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
    read     reads the result that the command left in a file; raises OSError or ValueError when it is not there
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


read_demo, read_sanitizer = partial(read_json, "demo"), partial(read_json, "sanitizer")


def read_benchmark(name: str) -> Any:
    """The report of a benchmark. Raises ValueError where ours has a time in no cell."""
    report = read_json(name)
    if not any("microseconds" in result for cell in report["cells"] for result in cell["results"][:1]):
        raise ValueError("no cell has a time")
    return report


def benchmark(name: str, limit: float) -> Part:
    """The part that runs bench_<name>.py."""
    command = (sys.executable, f"benchmarks/bench_{name}.py", f"--json={LOGS / name}.json")
    return Part(command, limit, partial(read_benchmark, name))


# The limits add up to TIME_LIMIT.
PARTS = {
    "build": Part((sys.executable, "setup.py", "build_ext", "--inplace"), 50),
    "tests": Part(  # in eight processes: most of the time goes into compiling kernels
        (sys.executable, "-m", "pytest", "tests/gpu", "-n", "8", f"--junitxml={LOGS / 'tests.xml'}"), 160, count_tests
    ),
    "sanitizer": Part(
        (sys.executable, "benchmarks/sanitize.py", f"--json={LOGS / 'sanitizer.json'}"), 60, read_sanitizer
    ),
    "tree_attention": benchmark("tree_attention", 75),
    "draft_head": benchmark("draft_head", 60),
    "step_ops": benchmark("step_ops", 50),
    "demo": Part(
        (sys.executable, "-m", "specexit", "demo", "--problems=8", f"--json={LOGS / 'demo.json'}"), 65, read_demo
    ),
}


def run(name: str, part: Part, limit: float) -> dict[str, Any]:
    """Run one part, its output going to build/gpu/<name>.out and .err.

    Returns its status ("passed", "failed" or "timed out"), seconds, and what it reported as `result`.
    """
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
            end(process)
            status = "timed out"
    report: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if part.read:
        try:
            report["result"] = part.read()
        except (OSError, ValueError, ET.ParseError) as error:
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
    process.wait()


def run_all(names: Sequence[str], parts: dict[str, Part], time_limit: float) -> dict[str, dict[str, Any]]:
    """Run the parts in order, each within its own limit and what is left of `time_limit` seconds."""
    shutil.rmtree(LOGS, ignore_errors=True)  # an earlier run's report must not be read as this one's
    LOGS.mkdir(parents=True)
    deadline = time.monotonic() + time_limit
    reports: dict[str, dict[str, Any]] = {}
    for name in names:
        left = deadline - time.monotonic()
        if left <= 0:
            reports[name] = {"status": "timed out", "seconds": 0.0, "error": "no time was left for it"}
            continue
        reports[name] = run(name, parts[name], min(parts[name].limit, left))
    return reports


def table(reports: dict[str, dict[str, Any]]) -> str:
    """One line a part: status, seconds, and what the tests counted."""
    lines = [f"{'part':<16}{'status':<11}{'seconds':>8}"]
    for name, report in reports.items():
        counts = report.get("result") if name == "tests" else None
        detail = ", ".join(f"{n} {what}" for what, n in counts.items()) if counts else report.get("error", "")
        lines.append(f"{name:<16}{report['status']:<11}{report['seconds']:>8.1f}  {detail}".rstrip())
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


def gpu_name() -> str:
    """Name of the first GPU. Raises RuntimeError where torch sees none."""
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"{sys.executable} has no torch ({error}); name another with PYTHON=") from error
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} of {sys.executable} sees none")
    return str(torch.cuda.get_device_name(0))


def main() -> int:
    """Run the parts that are asked for, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: %(default)s")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts must be of {', '.join(PARTS)}, was {', '.join(unknown)}")
    try:
        gpu = gpu_name()
    except RuntimeError as error:
        print(f"an NVIDIA GPU is needed: {error}", file=sys.stderr)
        return 2

    reports = run_all(names, PARTS, TIME_LIMIT)
    results = {
        "gpu": gpu,
        "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "commit": arguments.commit or answer("git", "describe", "--always", "--abbrev=40", "--dirty"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": package_environment(),
        "parts": reports,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{gpu}, commit {results['commit']}: {path}\n{table(reports)}")
    return int(any(report["status"] != "passed" for report in reports.values()))


if __name__ == "__main__":
    sys.exit(main())
