"""The commands of `specexit train`: exit signals for your own model."""

from __future__ import annotations

import typer

from specexit.cli.train_ablate import ablate
from specexit.cli.train_annotate import annotate
from specexit.cli.train_fit import fit

train = typer.Typer(
    name="train",
    help="Train exit signals for your own model: annotate its thinking, fit a draft, see what each part gives.",
    epilog="docs/training.md goes through it from start to end. `specexit calibrate` then chooses the thresholds.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)
train.command()(annotate)
train.command()(fit)
train.command()(ablate)
