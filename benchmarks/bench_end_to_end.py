"""The bundled problems solved three ways, in one run: `generate`, speculation, speculation with early exit; wall clock.

    python benchmarks/bench_end_to_end.py                  # eight problems, under a minute; --problems N for more
    python benchmarks/bench_end_to_end.py --all            # all 300
    python benchmarks/bench_end_to_end.py --device cpu     # on a CPU, although there is a GPU

It is `specexit demo` without the told example: float32, greedy, one problem at a time, the modes in turn after a
warm-up. Where speculation changes one token of `generate`'s text, no mode has a speed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

import torch
from rich.console import Console

from benchmarks import results_file
from benchmarks.command_line import new_file, positive
from specexit.bundled import Problem, load_problems
from specexit.cli import report
from specexit.cli.comparison import Comparison
from specexit.cli.loading import find_device


def as_json(comparison: Comparison, solved: Sequence[Problem]) -> dict[str, Any]:
    """The report: the demo's, and where it was measured. With another text than `generate`'s it has no modes."""
    device = comparison.decoder.device
    mismatches = comparison.mismatches()
    result = report.as_json(comparison.modes, mismatches, comparison.setting(1))
    result |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(comparison.decoder.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    if mismatches:
        del result["modes"]
        first = mismatches[0]
        result["unavailable"] = f"other text than generate's: {comparison.first_difference(first, solved[first])}"
    return result


def main() -> int:
    """Exit status: 0, or 1 where speculation changed the text."""
    everything = load_problems("test")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: the GPU where there is one")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--problems", type=positive, default=8, help="the first ones; default: %(default)s")
    number.add_argument("--all", action="store_const", dest="problems", const=len(everything), help="all of them")
    parser.add_argument("--json", type=new_file, help="write the results to this file (benchmarks/README.md)")
    arguments = parser.parse_args()
    if arguments.problems > len(everything):
        parser.error(f"--problems must be at most {len(everything)}, was {arguments.problems}")
    try:
        find_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))

    problems = everything[: arguments.problems]
    comparison = Comparison.of_bundled_pair(arguments.device)
    comparison.warm_up(problems[:1])
    for count, problem in enumerate(problems, 1):
        print(f"problem {count} of {len(problems)}", file=sys.stderr, flush=True)
        comparison.solve([problem])
        result = as_json(comparison, problems[:count])
        if arguments.json:
            results_file.write(result, arguments.json)  # whoever ends this script finds what is solved
        if "unavailable" in result:
            print(result["unavailable"], file=sys.stderr)
            return 1
    if result["device"] == "cpu":
        print("CPU: these times say nothing of a GPU")
    print("{device}, {dtype}, torch {torch}, threads {threads}".format(**result))
    console = Console(soft_wrap=True)
    report.print_table(comparison.modes, console)
    report.print_identity(len(problems), [], console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
