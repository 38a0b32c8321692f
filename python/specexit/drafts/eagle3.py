"""The EAGLE-3 draft with exit signals: one Llama layer over three of the base's features.

    feature_p = fc [low_p, mid_p, high_p]                       rows of fc behind the H-th: signals, source "fc"
    hidden_p  = layer(norm(embed(token_{p+1})), norm(feature_p))    attends to the rows before p
    logits_p  = lm_head(norm(hidden_p))                         of the token at p + 2
    signals_p = exit_head(norm(hidden_p))                       source "output"

EAGLE-3: arXiv 2503.01840; the signals: SpecExit, arXiv 2509.24248.

A token that the draft has proposed has no features yet: the hidden state that proposed it stands for them. So the tree
grows in levels, each one pass of the layer over the k best tokens of the level before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specexit.config import TreeConfig
from specexit.drafts.calibration import from_thresholds
from specexit.drafts.eagle3_batch import Eagle3Batch, reads_only_fc
from specexit.drafts.eagle3_config import Eagle3Config, Source
from specexit.drafts.eagle3_workspace import Workspace
from specexit.drafts.rope import RopeTable
from specexit_kernels.state import SIGNALS


class Eagle3Draft(nn.Module):
    """An EAGLE-3 draft with exit signals; implements `specexit.drafts.base.Draft`.

    Projections that read the same input are one matrix, in the order of their names: `load_draft` joins them and
    `save_draft` splits them. The weights are not initialised.

    embedding        the base's token embedding, used where it is and never copied
    own_embedding    `embedding` is the draft's own: it moves, and is saved, with the draft
    source           where signals are read: "fc", "output" or "auto", the best there is. A decoder selects anew, by
                     what its exit asks for
    device, dtype    None: those of the embedding; a base's cannot be another's
    Raises ValueError where the embedding does not fit the config, or the source is not there.
    """

    def __init__(
        self,
        config: Eagle3Config,
        embedding: nn.Module,
        *,
        own_embedding: bool = False,
        source: Source | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        table = embedding_table(embedding)
        _check_embedding(config, table)
        self.config = config
        self.own_embedding = own_embedding
        if own_embedding:
            self.embedding = embedding
        else:
            object.__setattr__(self, "embedding", embedding)  # not a submodule: it belongs to the base
        device, dtype = device or table.device, dtype or table.dtype

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.fc_weight = weight(hidden + len(config.fc_signals), 3 * config.target_hidden_size)
        place = (self.fc_weight.device, self.fc_weight.dtype)
        if not own_embedding and place != (table.device, table.dtype):
            raise ValueError(f"device and dtype must be those of the base's embedding, were {place[0]} and {place[1]}")
        self.input_norms = weight(2, hidden)  # of the embedding, of the feature
        qkv_heads = heads + 2 * config.num_key_value_heads
        self.qkv_weight = weight(qkv_heads * config.head_dim, 2 * hidden)
        self.qkv_bias = weight(qkv_heads * config.head_dim) if config.attention_bias else None
        self.o_weight = weight(hidden, heads * config.head_dim)
        self.o_bias = weight(hidden) if config.attention_bias else None
        self.mlp_norm = weight(hidden)
        self.gate_up_weight = weight(2 * inner, hidden)
        self.gate_up_bias = weight(2 * inner) if config.mlp_bias else None
        self.down_weight = weight(hidden, inner)
        self.down_bias = weight(hidden) if config.mlp_bias else None
        self.norm = weight(hidden)
        self.lm_head = weight(config.draft_vocab_size, hidden)
        self.exit_weight = None if config.exit_head is None else weight(len(SIGNALS), hidden)
        self.exit_bias = None if config.exit_head is None else weight(len(SIGNALS))
        self.d2t: Tensor | None  # [Vd] int32: target id = draft id + d2t[draft id]; None: they are the same
        self.register_buffer("d2t", None)
        self.source: Source | None = config.resolve_source(source)
        self.calibration: Mapping[str, Any] = from_thresholds(config.exit_head or {})
        self._rope = RopeTable(
            config.rope_parameters,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
        )

    @property
    def signals(self) -> tuple[str, ...]:
        if self.source == "fc":
            return self.config.fc_signals
        return SIGNALS if self.source == "output" else ()

    @property
    def feature_layers(self) -> tuple[int, ...] | None:
        return self.config.feature_layers

    @property
    def feature_size(self) -> int:
        return 3 * self.config.target_hidden_size

    def select_source(self, source: str | None) -> None:
        self.source = None if source is None else self.config.resolve_source(source)

    def allocate(
        self, batch: int, capacity: int, tree: TreeConfig, device: torch.device | str, dtype: torch.dtype
    ) -> Eagle3Batch:
        weight = self.fc_weight
        if torch.empty(0, device=device).device != weight.device:
            raise ValueError(f"device must be the draft's, {weight.device}, was {device}")
        if dtype != weight.dtype:
            raise ValueError(f"dtype must be the draft's, {weight.dtype}, was {dtype}")
        if tree.max_depth and tree.top_k > self.config.draft_vocab_size:
            raise ValueError(f"top_k must be at most the draft's vocabulary, {self.config.draft_vocab_size}")
        # A step's rows reach depth + 1 slots past the length, its levels top_k * (depth - 1).
        slots = capacity + max(tree.max_depth + 1, tree.top_k * (tree.max_depth - 1))
        if reads_only_fc(tree.max_depth, self.source):
            slots = 0
        return Eagle3Batch(self, Workspace(self.config, self._rope, batch, slots, tree, weight.device, dtype))


def embedding_table(embedding: nn.Module) -> Tensor:
    """The weight [V, H] of a token embedding. Raises ValueError where the module is none."""
    table = getattr(embedding, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2 or not table.is_floating_point():
        raise ValueError(f"embedding must be a token embedding with a weight [V, H], was {type(embedding).__name__}")
    return table


def _check_embedding(config: Eagle3Config, table: Tensor) -> None:
    if table.shape[0] != config.vocab_size:
        raise ValueError(
            f"the draft was made for another vocabulary: vocab_size is {config.vocab_size}, "
            f"the base's embedding has {table.shape[0]} rows"
        )
    if table.shape[1] != config.hidden_size:
        raise ValueError(
            f"the embedding must have the draft's hidden_size {config.hidden_size} in its last axis, "
            f"was {table.shape[1]}; a draft narrower than its base brings its own embed_tokens.weight"
        )
