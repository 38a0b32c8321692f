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
from torch.nn import functional as F  # noqa: N812

from specexit.config import TreeConfig
from specexit.drafts.base import Candidates, signal_columns
from specexit.drafts.eagle3_config import Eagle3Config, Source
from specexit.drafts.eagle3_workspace import Rows, Workspace
from specexit.drafts.rope import RopeTable, rotate_
from specexit_kernels import grow_beam, grow_level, project_features, unchecked
from specexit_kernels.draft_topk import check_arguments as check_draft_topk
from specexit_kernels.state import SIGNALS
from specexit_kernels.tree_attention import check_arguments as check_tree_attention


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
        self._rope = RopeTable(
            config.rope_parameters,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
        )
        self._token_map: Tensor | None = None
        self._workspace: Workspace | None = None

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

    @property
    def calibration(self) -> Mapping[str, Any]:
        return self.config.exit_head or {}

    def select_source(self, source: str | None) -> None:
        self.source = None if source is None else self.config.resolve_source(source)

    def allocate(
        self, batch: int, capacity: int, tree: TreeConfig, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        weight = self.fc_weight
        if torch.empty(0, device=device).device != weight.device:
            raise ValueError(f"device must be the draft's, {weight.device}, was {device}")
        if dtype != weight.dtype:
            raise ValueError(f"dtype must be the draft's, {weight.dtype}, was {dtype}")
        if tree.max_depth and tree.top_k > self.config.draft_vocab_size:
            raise ValueError(f"top_k must be at most the draft's vocabulary, {self.config.draft_vocab_size}")
        # A step's rows reach depth + 1 slots past the length, its levels top_k * (depth - 1).
        slots = capacity + max(tree.max_depth + 1, tree.top_k * (tree.max_depth - 1))
        if self._reads_only_fc(tree.max_depth):
            slots = 0
        self._workspace = Workspace(self.config, self._rope, batch, slots, tree, weight.device, dtype)
        self._token_map = self.d2t if self.d2t is not None and self.d2t.any() else None  # the identity costs nothing

    def grow(self, slots: int) -> None:
        w = self._allocated()
        if not self._reads_only_fc(w.depth):
            w.grow(slots)

    @torch.no_grad()
    def read(self, features: Tensor, tokens: Tensor, start: Tensor) -> None:
        w = self._allocated()
        if self._reads_only_fc(w.depth):
            return
        # Nothing of these rows but their keys and values is ever used: no attention, no MLP.
        config, width = self.config, self.config.num_attention_heads * self.config.head_dim
        feature, _ = self._project(features, self.fc_weight[: config.hidden_size])
        inputs, _ = self._inputs(tokens.flatten(), feature)
        bias = None if self.qkv_bias is None else self.qkv_bias[width:]
        kv = F.linear(inputs, self.qkv_weight[width:], bias).view(*tokens.shape, -1, config.head_dim)
        rows, _ = w.chain(start, tokens.shape[1])
        rotate_(kv[:, :, : config.num_key_value_heads], rows.rope)
        w.store(kv, rows.store)

    @torch.no_grad()
    def observe(self, features: Tensor, tokens: Tensor, start: Tensor, last: Tensor) -> Tensor:
        w = self._allocated()
        B, R = tokens.shape
        H, S = self.config.hidden_size, signal_columns(self.signals)
        fc = self.fc_weight if self.source == "fc" else self.fc_weight[:H]
        feature, signals = self._project(features, fc)
        if self.source == "fc" and signals.shape[-1] < S:  # one signal alone, behind those it lacks
            signals = F.pad(signals, (S - signals.shape[-1], 0), value=float("nan"))
        if self._reads_only_fc(w.depth):
            return signals.view(B, R, S)
        hidden = self._layer(tokens.flatten(), feature, *w.chain(start, R))
        at = (w.rows, last.long())
        if self.source == "output":  # one pass over lm_head gives the signals of all rows and the children of the last
            tokens, logprobs, signals = self._top(hidden, w.k, self.exit_weight, self.exit_bias)
            tokens, logprobs = (x.view(B, R, w.k)[at] for x in (tokens, logprobs))
            hidden = hidden.view(B, R, H)[at]
        else:
            hidden = hidden.view(B, R, H)[at]
            tokens, logprobs, _ = self._top(hidden, w.k)
        w.keep(tokens, logprobs, hidden)
        return signals.view(B, R, S)

    @torch.no_grad()
    def propose(self, root: Tensor, lengths: Tensor) -> Candidates:
        w = self._allocated()
        B, k = w.batch, w.k
        if w.depth == 0:
            return Candidates(root.new_empty(B, 0), root.new_empty(B, 0, dtype=torch.float32), root.new_empty(B, 0))
        beam, scores, hidden = w.kept()
        tokens, all_scores = [beam], [scores]
        beams: list[Tensor] = []
        hidden = hidden.unsqueeze(1).expand(-1, k, -1).flatten(0, 1)
        masks = w.chain_masks(lengths)
        for level, rows in enumerate(w.level_rows(lengths)):
            if level == 0 or k == 1:
                visible = w.own_bits[level]
            hidden = self._layer(beam.flatten(), hidden, rows, visible, masks[level])
            children, logprobs, _ = self._top(hidden, k)
            if k == 1:  # a chain has nothing to choose: the child is the beam, scored as `grow_beam` does
                beam = children
                grown = scores = torch.minimum(scores + logprobs, scores)
            elif level + 1 == w.levels:  # it is only scored
                grown = grow_beam(children.view(B, k, k), logprobs.view(B, k, k), scores, 1)[0]
            else:
                ranked = (children.view(B, k, k), logprobs.view(B, k, k), scores)
                rows_of_beam = (hidden.view(B, k, -1), visible, w.own_bits[level + 1])
                grown, beam, chosen, scores, hidden, visible = grow_level(*ranked, *rows_of_beam, k)
                hidden = hidden.flatten(0, 1)
                beams.append(chosen)
            tokens.append(children.view(B, k * k))
            all_scores.append(grown)
        return Candidates(torch.cat(tokens, 1), torch.cat(all_scores, 1), w.parents(beams))

    def _project(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, R, 3 Ht] -> the draft's features [N, H], and the raw signals of the weight's other rows."""
        flat, H = features.flatten(0, 1), self.config.hidden_size
        if self.config.target_hidden_size == H:
            feature, signals = project_features(flat.view(-1, 3, H).unbind(1), weight)
            return feature, signals.float()
        # A draft narrower than its base: the op has no such case.
        return F.linear(flat, weight[:H]), F.linear(flat.float(), weight[H:].float())

    def _inputs(self, tokens: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N] and their features [N, H] -> the layer's input [N, 2H] and its residual [N, H]."""
        pair = torch.stack((self.embedding(tokens), feature), 1)
        normed = F.rms_norm(pair, pair.shape[-1:], None, self.config.rms_norm_eps) * self.input_norms
        return normed.flatten(1), normed[:, 1] if self.config.norm_before_residual else feature

    def _layer(
        self, tokens: Tensor, feature: Tensor, rows: Rows, visible: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """One pass over N = B * Q rows: the layer's output before the norm [N, H]; their keys and values are stored.

        visible   [B, Q, W] int64: the scratch slots, behind the committed rows, that each row sees
        mask      None, or the same for all slots as `tree_attention` takes it
        """
        w, config = self._allocated(), self.config
        heads = config.num_attention_heads
        inputs, residual = self._inputs(tokens, feature)
        qkv = F.linear(inputs, self.qkv_weight, self.qkv_bias).view(*rows.positions.shape, -1, config.head_dim)
        rotate_(qkv[:, :, : heads + config.num_key_value_heads], rows.rope)
        w.store(qkv[:, :, heads:], rows.store)
        scale, query = config.head_dim**-0.5, qkv[:, :, :heads]
        where = (rows.lengths, rows.positions, visible)
        arguments = (query, w.keys, w.values, *where, scale, None, None, None, None, mask)
        if w.fresh:
            check_tree_attention(*arguments)
        attended = unchecked.tree_attention(*arguments)
        hidden = _add_linear(residual, attended.view(len(tokens), -1), self.o_weight, self.o_bias)
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.mlp_norm, config.rms_norm_eps)
        gate, up = F.linear(normed, self.gate_up_weight, self.gate_up_bias).chunk(2, -1)
        return _add_linear(hidden, F.silu(gate) * up, self.down_weight, self.down_bias)

    def _top(
        self, hidden: Tensor, k: int, exit_weight: Tensor | None = None, exit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest next tokens of each row [N, H], their log-probabilities, and the row's signals."""
        eps, token_map = self.config.rms_norm_eps, self._token_map
        arguments = (hidden, self.norm, eps, self.lm_head, k, exit_weight, exit_bias, token_map)
        if self._allocated().fresh:
            check_draft_topk(*arguments)
        tokens, logprobs, signals = unchecked.draft_topk(*arguments)
        return tokens, logprobs.float(), signals.float()  # a float64 draft is scored as any other

    def _allocated(self) -> Workspace:
        if self._workspace is None:
            raise RuntimeError("the draft has no cache yet: call allocate first")
        return self._workspace

    def _reads_only_fc(self, depth: int) -> bool:
        """No tree to grow and no signal on the layer's output: the layer need not run, and there is no cache."""
        return depth == 0 and self.source != "output"


def _add_linear(x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + a linear layer of `inputs` [N, in], in one operation."""
    return torch.addmm(x if bias is None else x + bias, inputs, weight.t())


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
