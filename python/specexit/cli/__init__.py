"""The `specexit` command: demo, generate, info, train, calibrate.

Importing this module imports neither torch nor transformers, so that `--help` and usage errors answer at once; the
commands import what they need when they run. Exit status: 0 done, 1 the run failed, 2 bad usage or bad input.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from specexit.cli.calibrate import calibrate
from specexit.cli.console import RunFailed, open_stdio, report_error
from specexit.cli.demo import demo
from specexit.cli.generate import generate
from specexit.cli.info import info
from specexit.cli.train import train

_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    name="specexit",
    help="Speculative decoding that stops a reasoning model when it knows the answer.",
    epilog="Start with `specexit demo`. Each command has its own `--help`, with examples.",
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo)
app.command()(generate)
app.command()(info)
app.add_typer(train)
app.command()(calibrate)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"specexit-kernels {version('specexit-kernels')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. `arguments`: those of the process by default.

    ValueError, OSError and ImportError are taken for bad input and reported in one line, but for disks that are full or
    broken: there the run has failed. Other exceptions are bugs and keep their traceback.
    """
    open_stdio()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments[:1]
    try:
        return app(_with_json_file(arguments), prog_name="specexit", standalone_mode=False) or 0
    except typer.TyperException as error:  # a usage error
        return report_error(error.format_message(), error.exit_code, hint=True)
    except RunFailed as error:
        if debug:
            raise
        return report_error(error, 1)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        full = isinstance(error, OSError) and error.errno in _FAILURES
        return report_error(error, 1 if full else 2)


def _with_json_file(arguments: list[str]) -> list[str]:
    """`demo --json` without a file means stdout; typer has no option whose value may be left out."""
    filled = []
    for index, argument in enumerate(arguments):
        filled.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--json" and "demo" in arguments[:index] and (not following or following[0].startswith("--")):
            filled.append("-")
    return filled
