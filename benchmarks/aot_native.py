"""What the compiler made of the CUDA kernels, without a GPU: registers, spills, shared memory, against a budget.

    python benchmarks/aot_native.py            # the module that is built, against csrc/budget.json
    python benchmarks/aot_native.py --write    # the budget of what is built

It reads the machine code in specexit_kernels._C for each architecture. Exit status 1: a kernel has a stack, that is, it
spills or indexes registers; or it takes more than its budget, which is the most it takes on any architecture; or it has
none.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

from specexit_kernels import native

BUDGET = Path(__file__).resolve().parent.parent / "csrc" / "budget.json"
# Template arguments as the compiler's names have them.
FLOATS = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
VECTORS = {"h": "1", "t": "2", "j": "4", "5uint2": "8", "5uint4": "16"}  # bytes

Budget = dict[str, dict[str, int]]  # kernel -> "registers" of a thread, bytes of "shared" memory


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture: registers of a thread, bytes."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    shared: int

    def problems(self, budget: Budget) -> list[str]:
        """What must not be, in words."""
        found = [f"stack of {self.stack} bytes"] if self.stack else []
        allowed = budget.get(self.kernel)
        if allowed is None:
            return [*found, "no budget"]
        for what, taken in (("registers", self.registers), ("shared", self.shared)):
            if taken > allowed[what]:
                found.append(f"{what} {taken} above {allowed[what]}")
        return found


def kernel_name(symbol: str) -> str:
    """`build_tree_kernel<256>` of its symbol; other kernels keep theirs."""
    match = re.search(r".*\d([a-z_]+_kernel)(?:I(?:Li(\d+)E|(\w+?))(?:Lb([01])E)?EEv)?", symbol)
    if match is None:
        return symbol
    argument = match[2] or (FLOATS | VECTORS).get(match[3] or "", match[3])
    arguments = ", ".join(filter(None, (argument, match[4] and ("false", "true")[int(match[4])])))
    return f"{match[1]}<{arguments}>" if arguments else match[1]


def usages(module: Path, cuobjdump: Path) -> list[Usage]:
    """Of every kernel in a module on every architecture."""
    text = subprocess.run([cuobjdump, "-res-usage", module], capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^arch = (\w+)|^ *Function (\S+):\n +REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.MULTILINE)
    architecture, found = "", []
    for line in pattern.finditer(text):
        if line[1]:
            architecture = line[1]
        elif "_kernel" in line[2]:
            found.append(Usage(kernel_name(line[2]), architecture, *(int(line[i]) for i in (3, 4, 5))))
    if not found:
        raise RuntimeError(f"cuobjdump names no kernel of {module}: {text[:200]}")
    return found


def budget_of(found: Iterable[Usage]) -> Budget:
    """The most that each kernel takes on any architecture; registers in eights, as they are allocated."""
    budget: Budget = {}
    for usage in sorted(found, key=lambda usage: usage.kernel):
        most = budget.setdefault(usage.kernel, {"registers": 0, "shared": 0})
        most["registers"] = max(most["registers"], -(-usage.registers // 8) * 8)
        most["shared"] = max(most["shared"], usage.shared)
    return budget


def tool() -> Path:
    """Triton's cuobjdump. Raises RuntimeError where Triton is not installed."""
    try:
        from triton.backends import nvidia
    except ImportError as error:
        raise RuntimeError(f"cuobjdump comes with Triton: pip install triton ({error})") from error
    return Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def main() -> int:
    """Print a line a kernel and architecture, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the budget instead of comparing with it")
    arguments = parser.parse_args()
    if (reason := native.absent()) and not arguments.write:
        print(f"the CUDA kernels are left out: {reason}")
        return 0
    found = usages(Path(native.load().__file__), tool())
    if arguments.write:
        BUDGET.write_text(json.dumps(budget_of(found), indent=2) + "\n")
    budget: Budget = json.loads(BUDGET.read_text())
    wrong = 0
    for usage in found:
        problems = usage.problems(budget)
        wrong += bool(problems)
        taken = f"{usage.registers:4} registers {usage.shared:6} B"
        print("  ".join([f"{usage.kernel:32} {usage.architecture:8} {taken}", *(f"** {p}" for p in problems)]))
    missing = set(budget) - {usage.kernel for usage in found}
    print(f"{len(found)} kernels, {wrong} with problems" + (f"; not built: {', '.join(missing)}" if missing else ""))
    return int(wrong > 0 or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
