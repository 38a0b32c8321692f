"""A whole decode step in the shape of the public releases of EAGLE and SpecExit: PyTorch, launched from Python, with
the host in between, for one sequence.

The draft's layer, its attention over a dense mask, its head and every top k are operations of PyTorch; its cache grows
by concatenation. The tree is built on the CPU and comes back as a dense mask, one number for each node and slot. The
base is transformers' model with its own attention, over a cache whose length the host keeps. The path is found, the
cache compacted and the signals smoothed as in step_ops_release.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.cache_utils import Cache, CacheLayerMixin

from benchmarks.step_ops_release import follow, grow, keep, smooth
from benchmarks.step_problem import Problem
from specexit.drafts.rope import rope_table, rotate_


class Slots(CacheLayerMixin):
    """Keys and values of one layer in a fixed buffer, of which `length` slots are committed; a forward writes behind
    them and attends to all up to its own."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.length = keys.shape[2]
        self.keys, self.values = (F.pad(cache, (0, 0, 0, room)) for cache in (keys, values))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("it is filled when it is made")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end].copy_(key_states)
        self.values[:, :, self.length : end].copy_(value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class Release:
    """One sequence, as the release keeps it. Every `step` begins at the problem's text."""

    def __init__(self, problem: Problem) -> None:
        self.model, self.draft, self.tree = problem.base, problem.draft, problem.cell.tree
        self.committed, self.seen = problem.cell.length, problem.seen
        room = self.tree.nodes
        self.cache = Cache(layers=[Slots(keys, values, room) for keys, values in problem.batches()])
        config = self.config = self.draft.config
        self.features = config.feature_layers or (2, problem.cell.model.layers // 2, problem.cell.model.layers - 3)
        self.rope = rope_table(
            config.rope_parameters,
            head_dim=config.head_dim,
            positions=self.committed + self.tree.max_depth + 2,
            max_position_embeddings=config.max_position_embeddings,
            device=problem.device,
            dtype=problem.dtype,
        )
        generator = torch.Generator(problem.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)

        # The draft's rows before the root's: position L - 1 is read with the root, in the step.
        self.past = random(2, 1, config.num_key_value_heads, self.committed - 1, config.head_dim)
        self.last = random(1, 1, problem.draft.feature_size)
        self.root = problem.prompts[:, -1]
        self.text = problem.prompts

    def step(self) -> list[int]:
        """The root and the tokens that follow it."""
        hidden, past = self.read(self.last, self.root.unsqueeze(0), self.past, self.committed - 1)
        smoothed = [0.0, 0.0, 0.0]
        for signals in self.signals(hidden)[0].tolist():
            smoothed = smooth(signals, smoothed)
        tokens, mask, depths, leaves, _ = grow(self.root, *self.propose(hidden[:, -1:], past), self.tree.nodes)
        logits, features = self.verify(tokens, mask, depths)
        path, kept, last = follow(leaves, tokens, logits.argmax(1))
        caches = [cache[0] for layer in self.cache.layers for cache in (layer.keys, layer.values)]
        keep(caches, self.committed + path, self.committed)
        torch.cat([self.text[0], kept])
        features[:, path]  # what the next step reads
        return [*kept.tolist(), last]

    def written(self, run: list[int]) -> Tensor:
        """[2, Hkv, n, hd]: keys and values of all tokens of a run but the last, in the layer that is compared."""
        layer = self.cache.layers[self.seen]
        return torch.cat([layer.keys, layer.values])[:, :, self.committed : self.committed + len(run) - 1]

    def verify(self, tokens: Tensor, mask: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and features [1, T, 3H] of a tree whose mask is [1, 1, T, T], 1 where a node is seen."""
        seen = F.pad(mask, (self.committed, 0), value=1.0)
        output = self.model(
            input_ids=tokens.unsqueeze(0),
            position_ids=(self.committed + depths).unsqueeze(0),
            attention_mask=((1 - seen) * torch.finfo(self.past.dtype).min).to(self.past.dtype),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=True,
        )
        return output.logits[0], torch.cat([output.hidden_states[layer] for layer in self.features], -1)

    def read(self, features: Tensor, tokens: Tensor, past: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The draft over rows that follow one another: its hidden states and its cache."""
        feature = F.linear(features, self.draft.fc_weight)
        rows = tokens.shape[1]
        positions = torch.arange(start, start + rows, device=tokens.device)
        mask = torch.ones(rows, rows, device=tokens.device).tril()
        return self.layer(tokens, feature, positions, mask, past)

    def propose(self, hidden: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates of all levels below the row `hidden` [1, 1, H]: tokens, scores, parents, each [C]."""
        k, device = self.tree.top_k, hidden.device
        best, chosen = self.logprobs(hidden)[0, 0].topk(k)
        tokens, scores, parents = [self.ids(chosen)], [best], [torch.full((k,), -1, device=device)]
        beam, beam_scores, hidden = tokens[0], best, hidden.expand(-1, k, -1)
        own = mask = torch.eye(k, device=device)
        rows = torch.arange(k, device=device)  # of the beam, among the candidates
        count = k
        for level in range(self.tree.max_depth - 1):
            positions = torch.full((k,), self.committed + level, device=device)
            hidden, past = self.layer(beam.unsqueeze(0), hidden, positions, mask, past)
            best, chosen = self.logprobs(hidden)[0].topk(k)
            total = best + beam_scores.unsqueeze(1)
            tokens.append(self.ids(chosen).flatten())
            scores.append(total.flatten())
            parents.append(rows.repeat_interleave(k))
            beam_scores, picked = total.flatten().topk(k)
            above = picked // k
            beam, hidden, rows = tokens[-1][picked], hidden[:, above], count + picked
            mask = torch.cat([mask[above], own], 1)
            count += k * k
        return torch.cat(tokens), torch.cat(scores), torch.cat(parents)

    def ids(self, tokens: Tensor) -> Tensor:
        """The base's, of the draft's."""
        assert self.draft.d2t is not None
        return tokens + self.draft.d2t[tokens]

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Of the next token, [1, Q, Vd]."""
        return F.linear(self.normed(hidden), self.draft.lm_head).float().log_softmax(-1)

    def signals(self, hidden: Tensor) -> Tensor:
        """The exit signals [1, Q, 3]."""
        assert self.draft.exit_weight is not None
        return F.linear(self.normed(hidden), self.draft.exit_weight, self.draft.exit_bias)

    def normed(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self.draft.norm, self.config.rms_norm_eps)

    def layer(
        self, tokens: Tensor, feature: Tensor, positions: Tensor, mask: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The draft's layer over Q rows that see all of the past but its last slots, for which `mask` [Q, slots] says
        so: hidden states [1, Q, H] and the longer past."""
        config, draft = self.config, self.draft
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        eps, width = config.rms_norm_eps, feature.shape[-1:]
        normed = [
            F.rms_norm(x, width, weight, eps)
            for x, weight in zip((draft.embedding(tokens), feature), draft.input_norms, strict=True)
        ]
        qkv = F.linear(torch.cat(normed, -1), draft.qkv_weight).view(1, tokens.shape[1], -1, size)
        rotate_(qkv[:, :, : heads + kv_heads], self.rope[positions])
        query, *new = qkv.transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        past = torch.cat([past, torch.stack(new)], 3)
        keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in past)
        hidden_slots = (1 - mask) * torch.finfo(past.dtype).min
        bias = F.pad(hidden_slots, (past.shape[3] - mask.shape[1], 0))
        scores = torch.matmul(query, keys.transpose(2, 3)) * size**-0.5 + bias
        attended = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(values.dtype), values)
        hidden = feature + F.linear(attended.transpose(1, 2).flatten(2), draft.o_weight)
        inner = F.rms_norm(hidden, width, draft.mlp_norm, eps)
        gate, up = F.linear(inner, draft.gate_up_weight).chunk(2, -1)
        return hidden + F.linear(F.silu(gate) * up, draft.down_weight), past
