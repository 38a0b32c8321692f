"""Triton kernels. They are imported when one is first asked for: importing Triton takes a while."""

from __future__ import annotations

import importlib.util


def absent() -> str | None:
    """Why the Triton kernels cannot be used here and how to get them; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: a CUDA build of torch brings it, or pip install triton"
    return None
