"""`specexit train fit`: a draft for a base, from annotated traces of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specexit.cli.console import RunFailed, note, require_files, stderr, stdout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specexit.training.fit import FitResult

_DRAFT, _TRAINING, _RUN = "Draft", "Training", "Run"


def fit(
    model: Annotated[str, typer.Option(metavar="PATH|HUB-ID", help="The base that the traces are of.")],
    traces: Annotated[
        list[Path], typer.Option(metavar="FILE", help="What `specexit train annotate` has written; may be repeated.")
    ],
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Gets the draft, and while it is trained the checkpoints.")
    ],
    init: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB-ID",
            help="Start from this EAGLE-3 draft, in any layout that is published; else from random weights.",
            rich_help_panel=_DRAFT,
        ),
    ] = None,
    signals_only: Annotated[
        bool,
        typer.Option("--signals-only", help="Train the exit signals of --init alone: minutes.", rich_help_panel=_DRAFT),
    ] = False,
    placement: Annotated[
        Literal["output", "fc", "both"],
        typer.Option(
            help="Read the signals on the draft layer's output, which has attended to the past, or, as the public "
            "release does, in rows of the feature projection.",
            rich_help_panel=_DRAFT,
        ),
    ] = "output",
    draft_vocab: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ids that a new draft can propose, the most frequent of the traces; all, or 32000 of more, if not "
            "given.",
            rich_help_panel=_DRAFT,
        ),
    ] = None,
    save_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Of the written draft: bfloat16, or what keeps --init as it is.", rich_help_panel=_DRAFT),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of the weights.", rich_help_panel=_TRAINING)] = 1000,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Traces in an update, of each process.", rich_help_panel=_TRAINING)
    ] = 8,
    lr: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Learning rate; 3e-3 at a hidden size of 128, and in inverse proportion to it, if not given.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    optimizer: Annotated[
        Literal["muon", "adamw"],
        typer.Option(help="Muon takes the layer's matrices, and AdamW the rest.", rich_help_panel=_TRAINING),
    ] = "muon",
    depth: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens that the draft learns to propose in a row, at least a tree's.",
            rich_help_panel=_TRAINING,
        ),
    ] = 6,
    max_length: Annotated[
        int, typer.Option(min=3, help="Tokens of a trace that are read.", rich_help_panel=_TRAINING)
    ] = 2048,
    signal_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="How hard each signal pulls at the draft's layer, as a share of what the tokens do.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.5,
    held_out: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the problems that is only measured on.", rich_help_panel=_RUN),
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order.", rich_help_panel=_RUN)] = 0,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps; 0: only at the end.", rich_help_panel=_RUN)
    ] = 200,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that are kept meanwhile.", rich_help_panel=_RUN)] = 2,
    cache_gib: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Host memory for what the base says of traces, so that it need not read them every epoch.",
            rich_help_panel=_RUN,
        ),
    ] = 1.0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.", rich_help_panel=_RUN)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of the base: float32 on a CPU, the checkpoint's on a GPU if not given. The draft is trained in "
            "float32.",
            rich_help_panel=_RUN,
        ),
    ] = None,
) -> None:
    """Train an EAGLE-3 draft with exit signals for a base, from annotated traces of it.

    The draft learns to propose the base's next tokens several steps ahead, on its own guesses, and to say at each token
    of the thinking how sure the answer is, how far the thinking has come, and how much is left. The folder then is a
    draft as --draft takes it elsewhere; training.jsonl in it has a line for each step.

    A run that was stopped goes on when the same command is given again. Several GPUs: `accelerate launch -m specexit
    train fit ...`, with a batch of --batch-size on each.

    Examples:

        specexit train fit --model ./base --traces traces.jsonl --output draft
        specexit train fit --model ./base --traces traces.jsonl --output draft --init ./eagle3 --signals-only
        specexit train fit --model ./base --traces traces.jsonl --output draft --init ./eagle3 --lr 1e-5 --steps 300
    """
    require_files(traces, "--traces")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, {output} is a file")
    _require_parent(output)
    if signals_only and init is None:
        raise ValueError("--signals-only must come with --init, the draft whose tokens stay as they are")
    # Only now: torch and transformers take seconds to import.
    import torch
    from transformers.utils import logging

    from specexit.cli.loading import find_device
    from specexit.loading import load_base
    from specexit.training.fit import fit as fit_draft
    from specexit.training.fit_config import FitConfig
    from specexit.training.processes import find_processes

    config = FitConfig(
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        depth=depth,
        placement=placement,
        signals_only=signals_only,
        init=init,
        draft_vocab=draft_vocab,
        max_length=max_length,
        held_out=held_out,
        signal_share=signal_share,
        seed=seed,
        save_dtype=save_dtype,
        checkpoint_every=checkpoint_every,
        keep=keep,
        cache_gib=cache_gib,
    )
    place = find_device(device)
    processes = find_processes(cpu=device == "cpu" or not torch.cuda.is_available())
    logging.disable_progress_bar()
    base = load_base(model, None if dtype is None else getattr(torch, dtype), processes.device or place)
    with _progress(steps, processes.writes) as show:
        try:
            result = fit_draft(base, traces, output, config, on_log=show, processes=processes)
        except FloatingPointError as error:
            raise RunFailed(str(error)) from error
    if processes.writes:
        _print_result(result, steps)


def _require_parent(output: Path) -> None:
    """Raise ValueError where the folder could not be made, or not be written to."""
    there = output.resolve()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        raise ValueError(f"--output: no permission to write {output}")


@contextmanager
def _progress(steps: int, shown: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar of the steps with their losses; what the traces come to, and measurements, as lines above it."""
    console = stderr()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task("", total=steps)

        def show(line: Mapping[str, Any]) -> None:
            if "data" in line:
                note(_data(line["data"]))
            elif "held_out" in line:
                note(f"step {line['step']}, held-out problems: {_measured(line['held_out'])}")
            else:
                progress.update(task, completed=line["step"], description=_losses(line))

        yield show


def _data(data: Mapping[str, Any]) -> str:
    parts = [f"traces: {data['train']} to train on, {data['held_out']} held out"]
    reasons = (
        ("flawed", "left out with a flaw"),
        ("uncut", "left out without a boundary"),
        ("too_long", "left out with a prompt beyond --max-length"),
        ("truncated", f"cut at --max-length, by {data['lost_tokens']} tokens in all"),
    )
    parts += [f"{data[key]} {reason}" for key, reason in reasons if data[key]]
    if data["coverage"] < 1:
        parts.append(f"{data['coverage']:.1%} of the generated tokens are in the draft's vocabulary")
    if data["resumed_from"]:
        parts.append(f"going on from step {data['resumed_from']}")
    return "; ".join(parts)


def _losses(line: Mapping[str, Any]) -> str:
    parts = ["tokens " + " ".join(f"{loss:.2f}" for loss in line["tokens"])] if line.get("tokens") else []
    return ", ".join(parts + _signals(line))


def _measured(held_out: Mapping[str, Any]) -> str:
    parts = []
    if "agreement" in held_out:
        parts.append("agreement by depth " + " ".join(_share(share) for share in held_out["agreement"]))
    return ", ".join(parts + _signals(held_out)) or "none"


def _signals(losses: Mapping[str, Any]) -> list[str]:
    """Losses of confidence, progress and remaining, where they are trained."""
    there = [(name, losses[name].values()) for name in ("output", "fc") if name in losses]
    return [f"signals of {name} " + " ".join(map(_loss, values)) for name, values in there]


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"  # None: the held-out texts are cut before their thinking


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _print_result(result: FitResult, steps: int) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("draft", str(result.output))
    begun = result.resumed_from
    table.add_row(
        "steps", f"{steps}" + (", all done before" if begun == steps else f", from {begun} on" if begun else "")
    )
    if "agreement" in result.held_out:
        shares = " ".join(_share(share) for share in result.held_out["agreement"])
        table.add_row("next token as the base's, by depth", shares)
    for name, where in (("output", "exit head"), ("fc", "rows of fc")):
        if name in result.held_out:
            losses = ", ".join(f"{signal} {_loss(loss)}" for signal, loss in result.held_out[name].items())
            table.add_row(f"losses of the {where}", losses)
    if not result.held_out:
        table.add_row("measured", "nothing: no problem was held out")
    stdout().print(table)
