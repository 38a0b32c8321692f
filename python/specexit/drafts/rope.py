"""Rotary position embedding from tables: one gather by position, then three operations for queries and keys together.

The tables are transformers' own (every scaling whose frequencies are fixed: llama3, yarn, linear, ...), so they agree
with what the draft was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

FOLLOW_THE_LENGTH = ("dynamic", "longrope")  # frequencies that change with the longest position: no table can hold them


def parse_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope parameters of a config.json, in transformers' form: rope_type, rope_theta and what the type needs.

    Reads `rope_parameters`, or the older `rope_theta` with `rope_scaling`. Raises ValueError for a scaling that
    transformers does not know, that is incomplete, or that follows the length.
    """
    given: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None:
            if not isinstance(config[key], Mapping):
                raise ValueError(f"{key} must be an object, was {config[key]!r}")
            given[key] = dict(config[key])  # transformers fills it in place
    for key in ("rope_theta", "max_position_embeddings"):
        if config.get(key) is not None:
            given[key] = config[key]
    scaling = given.get("rope_parameters", given.get("rope_scaling", {}))
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type in FOLLOW_THE_LENGTH:
        raise ValueError(f"rope type {rope_type!r} follows the length, which a decode step does not know")
    if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope type {rope_type!r} is not one of {sorted(ROPE_INIT_FUNCTIONS)}")
    theta = given.get("rope_theta", scaling.get("rope_theta", 1.0))
    if not isinstance(theta, (int, float)) or not theta > 0:
        raise ValueError(f"rope_theta must be a positive number, was {theta!r}")
    try:
        parameters = LlamaConfig(**given).rope_parameters
        rope_table(parameters, head_dim=2, positions=1)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"rope parameters {given} cannot be used: {error}") from error
    return dict(parameters)


def rope_table(
    parameters: Mapping[str, Any],
    *,
    head_dim: int,
    positions: int,
    max_position_embeddings: int = 2048,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[positions, 2, 1, head_dim]: cosine and sine of every position; the first half of the sines is negated.

    With the sign in the table, "rotate half" is a roll of the head's axis: see `rotate_`.
    """
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters=dict(parameters),
        max_position_embeddings=max_position_embeddings,
    )
    rope = LlamaRotaryEmbedding(config)
    at = torch.arange(positions).unsqueeze(0)
    cos, sin = rope(torch.zeros((), dtype=torch.float32), at)
    sin = torch.cat((-sin[..., : head_dim // 2], sin[..., head_dim // 2 :]), -1)
    return torch.stack((cos[0], sin[0]), 1).unsqueeze(2).to(device, dtype)


class RopeTable:
    """`rope_table` of one draft, made once as far as it has been needed: a decoder asks for it with every batch."""

    def __init__(self, parameters: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int) -> None:
        self._options: dict[str, Any] = {"head_dim": head_dim, "max_position_embeddings": max_position_embeddings}
        self._parameters = parameters
        self._table = torch.empty(0)

    def reach(self, positions: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table of `positions` positions or more."""
        table = self._table
        if len(table) < positions or table.device != device or table.dtype != dtype:
            rows = max(positions, 2 * len(table) if len(table) < positions else len(table), 1024)
            self._table = rope_table(self._parameters, positions=rows, device=device, dtype=dtype, **self._options)
        return self._table


def rotate_(heads: Tensor, rope: Tensor) -> None:
    """Rotate queries or keys [.., heads, head_dim] in place by rows [.., 2, 1, head_dim] of the table."""
    cos, sin = rope.unbind(-3)
    rolled = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(rolled, sin)
