"""What an EAGLE-3 draft holds of a batch, and how it reads and proposes there. eagle3.py has the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from specexit.drafts.base import Candidates, signal_columns
from specexit.drafts.eagle3_config import Source
from specexit.drafts.eagle3_workspace import Rows, Workspace
from specexit.drafts.rope import rotate_
from specexit_kernels import grow_beam, grow_level, project_features, unchecked
from specexit_kernels.draft_topk import check_arguments as check_draft_topk
from specexit_kernels.tree_attention import check_arguments as check_tree_attention

if TYPE_CHECKING:
    from specexit.drafts.eagle3 import Eagle3Draft


class Eagle3Batch:
    """An EAGLE-3 draft at work on a batch; implements `specexit.drafts.base.DraftBatch`.

    Signals are read from where the draft's `source` was when the batch was allocated.
    """

    def __init__(self, draft: Eagle3Draft, workspace: Workspace) -> None:
        self.draft = draft
        self.workspace = workspace
        self._source = draft.source
        self._signals = signal_columns(draft.signals)
        self._token_map = draft.d2t if draft.d2t is not None and draft.d2t.any() else None  # the identity costs nothing

    @property
    def nbytes(self) -> int:
        return self.workspace.nbytes

    def rows(self, first: int, count: int) -> Eagle3Batch:
        part = object.__new__(Eagle3Batch)
        part.__dict__.update(self.__dict__, workspace=self.workspace.part(first, count))
        return part

    def grow(self, slots: int) -> None:
        if not self._reads_only_fc:
            self.workspace.grow(slots)

    @torch.no_grad()
    def read(self, features: Tensor, tokens: Tensor, start: Tensor) -> None:
        if self._reads_only_fc:
            return
        # Nothing of these rows but their keys and values is ever used: no attention, no MLP.
        draft, w = self.draft, self.workspace
        config, width = draft.config, draft.config.num_attention_heads * draft.config.head_dim
        feature, _ = self._project(features, draft.fc_weight[: config.hidden_size])
        inputs, _ = self._inputs(tokens.flatten(), feature)
        bias = None if draft.qkv_bias is None else draft.qkv_bias[width:]
        kv = F.linear(inputs, draft.qkv_weight[width:], bias).view(*tokens.shape, -1, config.head_dim)
        rows, _ = w.chain(start, tokens.shape[1])
        rotate_(kv[:, :, : config.num_key_value_heads], rows.rope)
        w.store(kv, rows.store)

    @torch.no_grad()
    def observe(self, features: Tensor, tokens: Tensor, start: Tensor, last: Tensor) -> Tensor:
        draft, w = self.draft, self.workspace
        B, R = tokens.shape
        H, S = draft.config.hidden_size, self._signals
        fc = draft.fc_weight if self._source == "fc" else draft.fc_weight[:H]
        feature, signals = self._project(features, fc)
        if self._source == "fc" and signals.shape[-1] < S:  # one signal alone, behind those it lacks
            signals = F.pad(signals, (S - signals.shape[-1], 0), value=float("nan"))
        if self._reads_only_fc:
            return signals.view(B, R, S)
        hidden = self._layer(tokens.flatten(), feature, *w.chain(start, R))
        at = (w.rows, last.long())
        if self._source == "output":  # one pass over lm_head gives the signals of all rows, the children of the last
            tokens, logprobs, signals = self._top(hidden, w.k, draft.exit_weight, draft.exit_bias)
            tokens, logprobs = (x.view(B, R, w.k)[at] for x in (tokens, logprobs))
            hidden = hidden.view(B, R, H)[at]
        else:
            hidden = hidden.view(B, R, H)[at]
            tokens, logprobs, _ = self._top(hidden, w.k)
        w.keep(tokens, logprobs, hidden)
        return signals.view(B, R, S)

    @torch.no_grad()
    def propose(self, root: Tensor, lengths: Tensor) -> Candidates:
        w = self.workspace
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
        flat, H = features.flatten(0, 1), self.draft.config.hidden_size
        if self.draft.config.target_hidden_size == H:
            feature, signals = project_features(flat.view(-1, 3, H).unbind(1), weight)
            return feature, signals.float()
        # A draft narrower than its base: the op has no such case.
        return F.linear(flat, weight[:H]), F.linear(flat.float(), weight[H:].float())

    def _inputs(self, tokens: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N] and their features [N, H] -> the layer's input [N, 2H] and its residual [N, H]."""
        draft = self.draft
        pair = torch.stack((draft.embedding(tokens), feature), 1)
        normed = F.rms_norm(pair, pair.shape[-1:], None, draft.config.rms_norm_eps) * draft.input_norms
        return normed.flatten(1), normed[:, 1] if draft.config.norm_before_residual else feature

    def _layer(
        self, tokens: Tensor, feature: Tensor, rows: Rows, visible: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """One pass over N = B * Q rows: the layer's output before the norm [N, H]; their keys and values are stored.

        visible   [B, Q, W] int64: the scratch slots, behind the committed rows, that each row sees
        mask      None, or the same for all slots as `tree_attention` takes it
        """
        draft, w, config = self.draft, self.workspace, self.draft.config
        heads = config.num_attention_heads
        inputs, residual = self._inputs(tokens, feature)
        qkv = F.linear(inputs, draft.qkv_weight, draft.qkv_bias).view(*rows.positions.shape, -1, config.head_dim)
        rotate_(qkv[:, :, : heads + config.num_key_value_heads], rows.rope)
        w.store(qkv[:, :, heads:], rows.store)
        scale, query = config.head_dim**-0.5, qkv[:, :, :heads]
        where = (rows.lengths, rows.positions, visible)
        arguments = (query, w.keys, w.values, *where, scale, None, None, None, None, mask)
        if w.fresh:
            check_tree_attention(*arguments)
        attended = unchecked.tree_attention(*arguments)
        hidden = _add_linear(residual, attended.view(len(tokens), -1), draft.o_weight, draft.o_bias)
        normed = F.rms_norm(hidden, hidden.shape[-1:], draft.mlp_norm, config.rms_norm_eps)
        gate, up = F.linear(normed, draft.gate_up_weight, draft.gate_up_bias).chunk(2, -1)
        return _add_linear(hidden, F.silu(gate) * up, draft.down_weight, draft.down_bias)

    def _top(
        self, hidden: Tensor, k: int, exit_weight: Tensor | None = None, exit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest next tokens of each row [N, H], their log-probabilities, and the row's signals."""
        draft, eps = self.draft, self.draft.config.rms_norm_eps
        arguments = (hidden, draft.norm, eps, draft.lm_head, k, exit_weight, exit_bias, self._token_map)
        if self.workspace.fresh:
            check_draft_topk(*arguments)
        tokens, logprobs, signals = unchecked.draft_topk(*arguments)
        return tokens, logprobs.float(), signals.float()  # a float64 draft is scored as any other

    @property
    def _reads_only_fc(self) -> bool:
        return reads_only_fc(self.workspace.depth, self._source)


def reads_only_fc(depth: int, source: Source | None) -> bool:
    """No tree to grow and no signal on the layer's output: the layer need not run, and there is no cache."""
    return depth == 0 and source != "output"


def _add_linear(x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x + a linear layer of `inputs` [N, in], in one operation."""
    return torch.addmm(x if bias is None else x + bias, inputs, weight.t())
