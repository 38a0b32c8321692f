"""The draft that is trained: a new one that suits the base, or an existing one with signals added."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specexit.base import BaseModel, rope_parameters
from specexit.drafts import Eagle3Config, Eagle3Draft, load_draft
from specexit.drafts.rope import parse_rope
from specexit.training.data import Example
from specexit_kernels.state import SIGNALS

Placement = Literal["output", "fc", "both"]
DRAFT_VOCABULARY = 32000  # of a larger base: as published EAGLE-3 drafts have it
ALL_SIGNALS = "confidence_progress_remain"  # of fc, as AngelSlim calls them
EXIT_HEAD = {"signals": ["sigmoid: confidence", "sigmoid: progress", "exp: 1 + remaining thinking tokens"]}
GAIN = 0.7  # of a random matrix; of those that write to the residual 0.3 of it, so that the layer starts near identity


def training_dtype(base: BaseModel) -> torch.dtype:
    """Of the weights while they are trained: float32, float64 of a base in float64."""
    return torch.promote_types(base.dtype, torch.float32)


def trainable_embedding(base: BaseModel) -> nn.Module:
    """The base's embedding in the dtype of training: itself, or a frozen copy, which takes V * H * 4 bytes."""
    embedding = base.model.get_input_embeddings()
    dtype = training_dtype(base)
    return embedding if base.dtype == dtype else copy.deepcopy(embedding).to(dtype).requires_grad_(False)


def new_draft(
    base: BaseModel,
    embedding: nn.Module,
    examples: Sequence[Example],
    placement: Placement,
    size: int | None,
    seed: int,
) -> Eagle3Draft:
    """A draft of the base's sizes with random weights; its head is the base's.

    size  of its vocabulary: the ids that are generated most often in the examples; None: all, or 32000 of more
    """
    size = min(base.vocab_size, DRAFT_VOCABULARY) if size is None else size
    if not 1 <= size <= base.vocab_size:
        raise ValueError(f"draft_vocab must be from 1 to the base's vocabulary of {base.vocab_size}, was {size}")
    draft = Eagle3Draft(_config(base, placement, size), embedding)
    ids = frequent_ids(examples, base.vocab_size, size)
    if ids is not None:
        draft.d2t = (ids - torch.arange(size)).int().to(base.device)
    initialise(draft, base, ids, seed)
    start_signals(draft, examples, seed)
    return draft


def _config(base: BaseModel, placement: Placement, size: int) -> Eagle3Config:
    c: Any = base.config
    hidden, heads = int(c.hidden_size), int(c.num_attention_heads)
    return Eagle3Config(
        hidden_size=hidden,
        # Of a mixture of experts this is an expert's size, or nothing.
        intermediate_size=int(getattr(c, "intermediate_size", None) or 4 * hidden),
        num_attention_heads=heads,
        num_key_value_heads=int(getattr(c, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(c, "head_dim", None) or hidden // heads),
        vocab_size=base.vocab_size,
        draft_vocab_size=size,
        target_hidden_size=hidden,
        rope_parameters=_rope(base),
        rms_norm_eps=float(getattr(c, "rms_norm_eps", None) or 1e-6),
        max_position_embeddings=int(getattr(c, "max_position_embeddings", None) or 2048),
        feature_layers=base.feature_layers,
        early_stop_method=ALL_SIGNALS if placement in ("fc", "both") else None,
        exit_head=EXIT_HEAD if placement in ("output", "both") else None,
        extra={"tie_word_embeddings": False},
    )


def _rope(base: BaseModel) -> dict[str, Any]:
    """The base's rotary embedding where a draft can have it: of its full attention, and if its table is fixed."""
    given = getattr(base.config, "rope_parameters", None) or {}
    own = dict(given.get("full_attention") or rope_parameters(base.config)[0])
    own.pop("partial_rotary_factor", None)  # the draft rotates whole heads
    theta = own.get("rope_theta") or 10000.0
    positions = getattr(base.config, "max_position_embeddings", None) or 2048
    try:
        return parse_rope({"rope_parameters": {"rope_theta": theta, **own}, "max_position_embeddings": positions})
    except ValueError:  # it follows the length
        return {"rope_type": "default", "rope_theta": theta}


def frequent_ids(examples: Sequence[Example], vocabulary: int, size: int) -> Tensor | None:
    """The `size` ids that are generated most often, ascending; of equals the lower one. None: all there are."""
    if size == vocabulary:
        return None
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for example in examples:
        counts += torch.bincount(example.tokens[2:][example.generated[:-1]], minlength=vocabulary)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


@torch.no_grad()
def initialise(draft: Eagle3Draft, base: BaseModel, ids: Tensor | None, seed: int) -> None:
    """Random matrices, plain norms, and the rows of the base's head for the draft's."""
    generator = torch.Generator().manual_seed(seed)

    def fill(weight: Tensor, gain: float) -> None:
        noise = torch.randn(weight.shape, generator=generator)  # on the host: the same for every device
        weight.copy_(noise * (gain / weight.shape[1] ** 0.5))

    for weight, gain in (
        (draft.fc_weight, GAIN),
        (draft.qkv_weight, GAIN),
        (draft.o_weight, 0.3 * GAIN),
        (draft.gate_up_weight, GAIN),
        (draft.down_weight, 0.3 * GAIN),
    ):
        fill(weight, gain)
    for norm in (draft.input_norms, draft.mlp_norm, draft.norm):
        norm.fill_(1.0)
    head: Any = base.model.get_output_embeddings()
    rows = head.weight.detach()[: base.vocab_size]
    draft.lm_head.copy_(rows if ids is None else rows[ids.to(rows.device)])


@torch.no_grad()
def start_signals(draft: Eagle3Draft, examples: Sequence[Example], seed: int, names: Sequence[str] = SIGNALS) -> None:
    """Let the exit head start at what its labels are on average, and rows of fc at nothing.

    names  signals of fc that are new
    """
    H = draft.config.hidden_size
    for row, name in enumerate(draft.config.fc_signals):
        if name in names:
            draft.fc_weight[H + row] = 0.0
    if draft.exit_weight is None or draft.exit_bias is None:
        return
    values = torch.cat([example.values for example in examples]).double()
    weights = torch.cat([example.weights for example in examples]).double()
    mean = (values * weights).sum(0) / weights.sum(0).clamp(min=1e-9)
    share = mean[:2].clamp(0.01, 0.99)
    draft.exit_bias.copy_(torch.cat((share.logit(), mean[2:])))
    # Not zeros: the balance measures what the losses do to the layer's output, which is through these.
    generator = torch.Generator().manual_seed(seed + 1)
    draft.exit_weight.copy_(torch.randn(draft.exit_weight.shape, generator=generator) * (0.1 / H**0.5))


def existing_draft(
    path: str | os.PathLike[str],
    base: BaseModel,
    embedding: nn.Module,
    examples: Sequence[Example],
    placement: Placement,
    signals_only: bool,
    seed: int,
) -> Eagle3Draft:
    """A draft from its files, with the signals that `placement` asks for added where it has none.

    Raises ValueError where it is another base's, or has an exit head that training it would leave behind.
    """
    loaded = load_draft(path, embedding=embedding, device=base.device, dtype=training_dtype(base))
    c = loaded.config
    if loaded.feature_size != 3 * int(base.config.hidden_size):
        raise ValueError(
            f"init must be a draft for a base of hidden size {base.config.hidden_size}, "
            f"{os.fspath(path)} is for {c.target_hidden_size}"
        )
    if placement == "fc" and c.exit_head is not None and not signals_only:
        raise ValueError(
            "placement must be 'output' or 'both', was 'fc': init has an exit head on the layer's output, which would "
            "no longer fit the layer"
        )
    method = ALL_SIGNALS if placement in ("fc", "both") else c.early_stop_method
    head = EXIT_HEAD if placement in ("output", "both") else c.exit_head  # thresholds of the one before are not its own
    own = loaded.embedding if loaded.own_embedding else embedding
    config = replace(c, early_stop_method=method, exit_head=head)
    draft = Eagle3Draft(config, own, own_embedding=loaded.own_embedding, device=base.device, dtype=training_dtype(base))
    draft.d2t = loaded.d2t
    had = c.fc_signals
    start_signals(draft, examples, seed, [name for name in SIGNALS if name not in had])
    with torch.no_grad():
        H = c.hidden_size
        for name, parameter in loaded.named_parameters():
            if name == "fc_weight":
                draft.fc_weight[:H] = parameter[:H]
                for row, signal in enumerate(had):
                    draft.fc_weight[H + config.fc_signals.index(signal)] = parameter[H + row]
            else:
                draft.get_parameter(name).copy_(parameter)
    return draft
