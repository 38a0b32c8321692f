"""Devices and models as the command line names them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import logging

from specexit import ExitConfig, SpecExitDecoder, bundled_pair
from specexit_kernels.state import NO_BUDGET


def find_device(name: str | None) -> torch.device | None:
    """The device called `name`, None for None. Raises ValueError where there is no such device."""
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:1 and so on, was {name}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device


def load_decoder(
    base: Any, draft: Any, device: str | None = None, quiet: bool = True, **options: Any
) -> SpecExitDecoder:
    """`SpecExitDecoder.from_pretrained` without transformers' progress bars where they would only be noise."""
    if quiet:
        logging.disable_progress_bar()
    return SpecExitDecoder.from_pretrained(base, draft, device=find_device(device), **options)


def load_bundled(device: str | None, draft: Any = None, **options: Any) -> SpecExitDecoder:
    """A decoder over the bundled pair, or its base with another draft.

    Its layers are so small that a second CPU thread saves no time, and where other programs keep the cores busy the
    threads wait for each other: 100 tokens then take half a minute instead of a second. So one thread computes, unless
    OMP_NUM_THREADS says otherwise.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    pair = bundled_pair()
    return load_decoder(pair.base, draft or pair.draft, device, **options)


def draft_rule(decoder: SpecExitDecoder) -> ExitConfig:
    """The exit rule that the decoder was loaded with."""
    if not isinstance(decoder.exit, ExitConfig):
        raise ValueError("decoder must have one exit rule, had one a prompt")
    return decoder.exit


def watching(rule: ExitConfig) -> ExitConfig:
    """`rule` with its signals read and smoothed as they are, but never ending anything: what would they have said?"""
    return replace(rule, min_thinking_tokens=NO_BUDGET - 1)
