"""The CUDA kernels under compute-sanitizer, where it is installed: a few drawn cases of each op, by all of its tools.

    python benchmarks/sanitize.py [--json FILE]

memcheck finds accesses out of bounds, racecheck races in shared memory, synccheck barriers that not all threads reach,
initcheck reads of memory that nobody has written. The tools run side by side. Exit status 1: one found something, or
its tests failed. A tool that is not installed, or does not support the GPU as this machine offers it, is said to be so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

from benchmarks import gpu

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = ("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_step_ops_cuda.py", "-k", "sanitizer")
FOUND = 9  # exit status of a tool that has found something; pytest has none above 5
REFUSED = "Device not supported"
# Without the cache each tensor is an allocation, which the tools can tell apart.
ENVIRONMENT = {**gpu.ENVIRONMENT, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def executable() -> str | None:
    """Path of compute-sanitizer, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin"]))


def run(path: str, tool: str) -> subprocess.CompletedProcess[str]:
    """The reduced set under one tool; all output is in `stdout`."""
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, *TESTS]
    return subprocess.run(
        command, cwd=gpu.ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def verdict(status: int, output: str) -> str:
    """What a tool's exit status and output say, in a line."""
    if REFUSED in output:
        return f"unavailable: {REFUSED.lower()}"
    if status == FOUND:
        return "found something"
    return "failed" if status else "nothing found"


def main() -> int:
    """Run the tools, print a line each and the output of those that found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the tools said there too")
    arguments = parser.parse_args()
    path = executable()
    said = {}
    if path is None:
        said = dict.fromkeys(TOOLS, "unavailable: compute-sanitizer is not installed")
        print("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    else:
        with ThreadPoolExecutor(len(TOOLS)) as pool:
            for tool, done in zip(TOOLS, pool.map(partial(run, path), TOOLS), strict=True):
                said[tool] = verdict(done.returncode, done.stdout)
                print(f"{tool:10} {said[tool]}", flush=True)
                if said[tool] in ("found something", "failed"):
                    print(done.stdout[:6000], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")
    return int(any(line in ("found something", "failed") for line in said.values()))


if __name__ == "__main__":
    sys.exit(main())
