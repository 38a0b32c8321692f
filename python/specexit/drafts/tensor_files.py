"""The files of a checkpoint: one safetensors file, or shards with an index, or, only when asked for, a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"


def resolve(path: str | os.PathLike[str], revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The folder `path`, or the local copy of the hub's repository of that name.

    Raises FileNotFoundError where there is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = os.fspath(path)
    if folder.exists():
        raise FileNotFoundError(f"{name} must be a folder with config.json and {WEIGHTS}, is a file")
    try:
        patterns = ["config.json", "calibration.json", "*.safetensors", INDEX, *([PICKLE] if allow_pickle else [])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise FileNotFoundError(f"there is no folder {name}, and no repository of the hub can be called so") from None
    except OSError as error:  # no such repository, no access to it, no network
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub's repository is out of reach: {error}"
        ) from error


def read_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of the checkpoint in `folder`, on the CPU, by name.

    Raises FileNotFoundError where there are none, ValueError that names the file where one cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder / INDEX)
    if not (folder / PICKLE).is_file():
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS} or {INDEX}; it has neither")
    if not allow_pickle:
        raise ValueError(
            f"{folder / PICKLE} is a pickle and was not opened; pass allow_pickle=True, or convert it to {WEIGHTS}"
        )
    return _read_pickle(folder / PICKLE)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a valid safetensors file: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{index} is not valid JSON: {error}") from error
    weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a weight_map from tensor names to files")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({str(file) for file in weight_map.values()}):
        if Path(shard).name != shard:
            raise ValueError(f"{index} must name files beside it, names {shard!r}")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard} does not exist, though {index.name} names it")
        tensors |= _read_safetensors(index.parent / shard)
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise ValueError(f"{index} names tensors that its files do not hold: {', '.join(absent)}")
    return tensors


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{file} cannot be read as tensors alone: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} must hold a dictionary of tensors")
    return content
