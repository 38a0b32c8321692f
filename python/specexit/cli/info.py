"""`specexit info`: what is installed, and what each op would run on."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specexit.cli.console import stdout


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Versions, devices, and for every op which implementation would run and why.

    Paste its output into a bug report. `specexit info --json | jq .implementations` for scripts.
    """
    from specexit_kernels.environment import environment

    report = environment()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        print_report(report, stdout())


def print_report(report: dict[str, Any], console: Console) -> None:
    """Lay out `specexit_kernels.environment.environment()` for reading."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("specexit-kernels", report["package"])
    facts.add_row("python", f"{report['python']} on {report['system']}")
    for name, version in report["versions"].items():
        facts.add_row(name, version or "not installed")
    facts.add_row("CUDA of torch", report["cuda"] or "none: a CPU build")
    facts.add_row("devices", "\n".join(_device(d) for d in report["devices"]) or "CPU; torch sees no CUDA device")
    facts.add_row("native module", _native(report["native"]))
    console.print(facts)
    console.print()

    ops = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("op", "on CPU", "on CUDA", "why none faster"):
        ops.add_column(heading, overflow="fold")
    for name, row in report["implementations"].items():
        ops.add_row(name, row["cpu"], row["cuda"], row["why"])
    console.print(ops)


def _device(device: dict[str, Any]) -> str:
    return f"{device['name']}, compute capability {device['capability']}, {device['memory'] / 2**30:.0f} GiB"


def _native(native: dict[str, Any]) -> str:
    if not native["present"]:
        return f"absent: {native['reason']}"
    targets = ", ".join(native["architectures"])
    driver = f"driver for CUDA {native['driver']}" if native["driver"] else native["reason"]
    return f"CUDA {native['cuda']} for {targets}; {driver}; {native['devices']} device(s)"
