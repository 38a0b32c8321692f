"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, tensor-core code.

    python benchmarks/aot.py            # a named subset, a minute
    python benchmarks/aot.py --full     # every line of the tables, in every variant

Each launch that an op would make on an architecture is compiled for it ahead of time, and its machine code is read.
Exit status 1: something spills, needs more shared memory than there is, or lacks its tensor-core instruction. Of all
variants some have one value in local memory, although registers are left: so much is allowed with --full, and shown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined: the interpreter compiles nothing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script can be run by its path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.aot_cells import Cell, full, subset, tensor_core
from specexit_kernels.triton.launch import Launch

TOOLS = Path(nvidia.__file__).parent / "bin"
# KB of shared memory that a block may use (CUDA C++ programming guide, technical specifications). An A100 has 163; its
# line of the table also serves sm_86, sm_89 and sm_120.
SHARED = {80: 99, 90: 227, 100: 227}
OPCODES = ("HGMMA", "UTCHMMA", "HMMA", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True)
class Build:
    """What one launch was compiled to; shared memory in bytes, a count of each of OPCODES that occurs."""

    kernel: str
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]

    def problems(self, cell: Cell, allowed: int = 0) -> list[str]:
        """What must not be, in words; `allowed` bytes of stack may. Without tensor cores, for tests, it may spill."""
        found = []
        if cell.dtype != torch.float32 and self.stack > allowed:
            found += [f"stack of {self.stack} bytes"] if self.stack else []
            found += [f"{self.opcodes[name]} {name}" for name in ("LDL", "STL") if name in self.opcodes]
        if self.shared > SHARED[cell.capability] * 1024:
            found.append(f"{self.shared} bytes of shared memory")
        expected = tensor_core(cell, self.kernel)
        if expected and expected not in self.opcodes:
            found.append(f"no {expected}")
        return found


def build(launch: Launch, capability: int) -> Build:
    """Compile as a launch on that architecture would, with the specialisations that Triton makes of its arguments."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(
        **launch.arguments, num_warps=launch.warps, num_stages=launch.stages, debug=False
    )
    packed = launch.kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(launch.kernel, *packed[1:])
    compiled = triton.compile(source, target=target, options=packed[0].__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if numbers is None:
        raise RuntimeError(f"cuobjdump reports no resources: {usage.stdout}{usage.stderr}")
    counts = {opcode: len(re.findall(rf"\b{opcode}\b", code)) for opcode in OPCODES}
    return Build(
        launch.kernel.__name__,
        registers=int(numbers[1]),
        stack=int(numbers[2]),
        shared=compiled.metadata.shared,
        opcodes={opcode: count for opcode, count in counts.items() if count},
    )


def build_cell(cell: Cell) -> list[Build]:
    """Every launch of a cell."""
    return [build(launch, cell.capability) for launch in cell.launches()]


def main() -> int:
    """Compile, print a line a kernel, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every line of the table, in every variant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, was {arguments.jobs}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json must be in a folder that exists, was {str(arguments.json)!r}")
    cells = list(full() if arguments.full else subset())
    wrong, report = 0, []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for cell, builds in zip(cells, pool.map(build_cell, cells), strict=True):
            for made in builds:
                problems = made.problems(cell, 8 if arguments.full else 0)
                wrong += bool(problems)
                usage = f"{made.registers:3} registers {made.shared / 1024:5.0f} KB"
                notes = [f"{name} {count}" for name, count in made.opcodes.items()] + [f"** {p}" for p in problems]
                print(f"{cell.name:58} {made.kernel:14} {usage}  {'  '.join(notes)}", flush=True)
                report.append({"cell": cell.name, **asdict(made), "problems": problems})
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{len(report)} kernels compiled, {wrong} with problems")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
