"""`specexit train ablate`: what each part of an exit rule gives, as tables and a picture."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from specexit.cli.calibrate import load_for_traces, recorded
from specexit.cli.console import note, require_files, require_writable, stdout, write_whole


def ablate(
    model: Annotated[str, typer.Option(help="The base: a folder or a hub id.")],
    draft: Annotated[Path, typer.Option(help="The draft's folder.")],
    calibration: Annotated[list[Path], typer.Option(help="Annotated traces that thresholds are chosen on.")],
    test: Annotated[list[Path], typer.Option(help="Annotated traces that they are measured on, once.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="For ablation.json, ablation.md and accuracy.png.")],
    max_loss: Annotated[list[float] | None, typer.Option(help="Loss allowed on calibration. Default: 0, 0.01.")] = None,
    timed: Annotated[int, typer.Option(min=0, help="Test prompts that are decoded for the wall clock.")] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of texts that another engine has sampled; else the traces say it."),
    ] = None,
    keep_signals: Annotated[
        bool, typer.Option("--keep-signals", help="Keep recorded signals in DIR, and use those that are there.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")] = None,
) -> None:
    """Signals, smoothing, placement and boundaries one by one, beside fixed rules, budgets, the probe and the oracle.

    Thresholds are chosen on the calibration traces and measured once on the test traces, offline; only `--timed`
    decodes. Examples:

        specexit train ablate --model base --draft draft --calibration cal.jsonl --test test.jsonl --output tables
    """
    require_files(calibration, "--calibration")
    require_files(test, "--test")
    if not draft.is_dir():
        raise ValueError(f"--draft must be a folder, was {draft}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, was the file {output}")
    output.mkdir(parents=True, exist_ok=True)
    for name in ("ablation.json", "ablation.md", "accuracy.png"):
        require_writable(output / name, "--output")
    from specexit.training.ablate import LOSSES
    from specexit.training.ablate import ablate as run
    from specexit.training.calibrate import check_alike, exit_of, read_all, temperature_of
    from specexit.training.report import draw, markdown

    headers, parts = zip(*map(read_all, (calibration, test)), strict=True)
    check_alike(headers)
    header = headers[0]
    sampled_at = temperature_of(header, temperature)
    decoder = load_for_traces(model, draft, header, device)
    files = [output / f"{name}.safetensors" if keep_signals else None for name in ("calibration", "test")]
    signals = [partial(recorded, decoder, part, file) for part, file in zip(parts, files, strict=True)]
    result = run(
        decoder,
        *parts,
        signals=(signals[0], signals[1]),
        losses=LOSSES if max_loss is None else max_loss,
        timed=timed,
        temperature=sampled_at,
        exit=exit_of(header, decoder),
    )
    write_whole(output / "ablation.json", (json.dumps(result, indent=2) + "\n").encode())
    text = markdown(result)
    write_whole(output / "ablation.md", text.encode())
    stdout().print(text, markup=False, soft_wrap=True)
    if importlib.util.find_spec("matplotlib") is None:
        note("no accuracy.png: matplotlib is not installed (pip install matplotlib)")
    else:
        write_whole(output / "accuracy.png", draw(result))
    note(f"written to {output}: ablation.json, ablation.md")
