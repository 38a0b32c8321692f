"""An EAGLE-3 draft written out in float64, a row at a time, from the tensors of its file; and random drafts to test.

It shares nothing with the package: its own rope, a list of visible rows for a mask, no cache and no joined weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 128,
    "vocab_size": 40,
    "draft_vocab_size": 40,
    "early_stop_method": "confidence_progress_remain",
    "exit_head": {"signals": ["confidence", "progress", "remaining"]},
}


def speculators(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`config` as vLLM speculators writes it."""
    own = {"draft_vocab_size": config["draft_vocab_size"], "target_hidden_size": None, "norm_before_fc": False}
    layer = {k: v for k, v in config.items() if k not in ("draft_vocab_size", "architectures", "exit_head")}
    layer.pop("early_stop_method")
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "someone/base"}},
        "transformer_layer_config": layer,
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [2, 9, 15],
        **own,
        **changes,
    }


def random_tensors(
    config: dict[str, Any], rng: torch.Generator, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Tensors of a checkpoint that fits `config`, by their names in the EAGLE-3 layout."""
    H, inner, hd = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    V, Vd = config["vocab_size"], config["draft_vocab_size"]
    rows = {None: 0, "confidence_progress_remain": 3}.get(config.get("early_stop_method"), 1)
    shapes = {
        "fc.weight": (H + rows, 3 * config.get("target_hidden_size", H)),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * H),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * H),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, q),
        "midlayer.post_attention_layernorm.weight": (H,),
        "midlayer.mlp.gate_proj.weight": (inner, H),
        "midlayer.mlp.up_proj.weight": (inner, H),
        "midlayer.mlp.down_proj.weight": (H, inner),
        "norm.weight": (H,),
        "lm_head.weight": (Vd, H),
    }
    if config.get("exit_head") is not None:
        shapes |= {"exit_head.weight": (3, H), "exit_head.bias": (3,)}
    if config.get("attention_bias"):
        for name, size in (("q", q), ("k", kv), ("v", kv), ("o", H)):
            shapes[f"midlayer.self_attn.{name}_proj.bias"] = (size,)
    if config.get("mlp_bias"):
        for name, size in (("gate", inner), ("up", inner), ("down", H)):
            shapes[f"midlayer.mlp.{name}_proj.bias"] = (size,)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=rng, dtype=torch.float64)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * value
        elif len(shape) == 2:
            value = value * 1.5 / math.sqrt(shape[1])
        tensors[name] = value.to(dtype)
    if Vd != V:
        chosen = torch.randperm(V, generator=rng)[:Vd].sort().values
        tensors["d2t"] = chosen - torch.arange(Vd)
        tensors["t2d"] = torch.zeros(V, dtype=torch.bool).scatter_(0, chosen, True)
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@dataclass
class Row:
    """One row that the draft has read: what others attend to, and what its own output needs."""

    token: int
    feature: Tensor  # [H]
    position: int
    sees: list[Row]  # without itself

    key_value: tuple[Tensor, Tensor] | None = None  # [kv heads, head_dim], once they were asked for
    output: Tensor | None = None  # [H] before the norm, likewise


class Reference:
    """The draft of a checkpoint folder, with the table [V, H] of its embedding."""

    def __init__(self, folder: Path, embedding: Tensor) -> None:
        self.c = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.w = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        self.embedding = embedding.double()

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.w[f"midlayer.{name}.weight"] @ x
        return y + self.w[f"midlayer.{name}.bias"] if f"midlayer.{name}.bias" in self.w else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.w[f"{name}.weight"] * x / (x.square().mean() + self.c["rms_norm_eps"]).sqrt()

    def frequencies(self) -> Tensor:
        """In float32, as transformers has them: a position in the hundreds turns the rounding into 1e-5 of an angle."""
        hd, scaling = self.c["head_dim"], self.c.get("rope_scaling")
        plain = 1.0 / self.c["rope_theta"] ** (torch.arange(0, hd, 2).float() / hd)
        if scaling is None:
            return plain
        assert scaling["rope_type"] == "llama3"
        scaled = []
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        for f in plain:
            turns = scaling["original_max_position_embeddings"] / (2 * math.pi / f)  # over the original context
            share = ((turns - low) / (high - low)).clamp(0, 1)
            scaled.append((1 - share) * f / scaling["factor"] + share * f)
        return torch.stack(scaled)

    def rotate(self, head: Tensor, position: int) -> Tensor:
        half = len(head) // 2
        out = torch.empty_like(head)
        for i, f in enumerate(self.frequencies()):
            cos, sin = (position * f).cos().item(), (position * f).sin().item()
            out[i] = head[i] * cos - head[i + half] * sin
            out[i + half] = head[i + half] * cos + head[i] * sin
        return out

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [3 Ht] of a position -> the draft's feature [H], and the signals of fc."""
        z = self.w["fc.weight"] @ features.double()
        return z[: self.c["hidden_size"]], z[self.c["hidden_size"] :]

    def read(self, features: Tensor, tokens: list[int]) -> list[Row]:
        """Rows 0, 1, ..: features [n, 3 Ht] of those positions, and the tokens that follow them."""
        rows: list[Row] = []
        for position, token in enumerate(tokens):
            feature, _ = self.project(features[position])
            rows.append(Row(token, feature, position, list(rows)))
        return rows

    def inputs(self, row: Row) -> Tensor:
        embedded = self.norm("midlayer.input_layernorm", self.embedding[row.token])
        return torch.cat([embedded, self.norm("midlayer.hidden_norm", row.feature)])

    def key_value(self, row: Row) -> tuple[Tensor, Tensor]:
        """Keys and values [kv heads, head_dim]."""
        if row.key_value is None:
            hd = self.c["head_dim"]
            k = self.linear("self_attn.k_proj", self.inputs(row)).view(-1, hd)
            v = self.linear("self_attn.v_proj", self.inputs(row)).view(-1, hd)
            row.key_value = torch.stack([self.rotate(head, row.position) for head in k]), v
        return row.key_value

    def output(self, row: Row) -> Tensor:
        """The layer's output [H] before the norm."""
        if row.output is not None:
            return row.output
        hd, heads, kv_heads = (self.c[n] for n in ("head_dim", "num_attention_heads", "num_key_value_heads"))
        seen = [self.key_value(other) for other in [*row.sees, row]]
        queries = self.linear("self_attn.q_proj", self.inputs(row)).view(heads, hd)
        attended = []
        for h in range(heads):
            shared = h * kv_heads // heads
            q = self.rotate(queries[h], row.position)
            scores = torch.stack([q @ k[shared] for k, _ in seen]) / math.sqrt(hd)
            attended.append(sum(p * v[shared] for p, (_, v) in zip(scores.softmax(0), seen, strict=True)))
        residual = row.feature
        if self.c.get("norm_before_residual"):
            residual = self.norm("midlayer.hidden_norm", row.feature)
        hidden = residual + self.linear("self_attn.o_proj", torch.cat(attended))
        x = self.norm("midlayer.post_attention_layernorm", hidden)
        gate, up = self.linear("mlp.gate_proj", x), self.linear("mlp.up_proj", x)
        row.output = hidden + self.linear("mlp.down_proj", gate * torch.sigmoid(gate) * up)
        return row.output

    def exit_signals(self, row: Row) -> Tensor:
        return self.w["exit_head.weight"] @ self.norm("norm", self.output(row)) + self.w["exit_head.bias"]

    def logprobs(self, row: Row) -> dict[int, float]:
        """Of every next token that the draft can propose, by the base's id."""
        logprobs = (self.w["lm_head.weight"] @ self.norm("norm", self.output(row))).log_softmax(0)
        d2t = self.w.get("d2t", torch.zeros(len(logprobs)))
        return {v + int(d2t[v]): logprobs[v].item() for v in range(len(logprobs))}

    def check_candidates(
        self, rows: list[Row], tokens: list[int], scores: list[float], parents: list[int], k: int, depth: int
    ) -> None:
        """Assert that a beam of width k below the last row finds these candidates.

        Scores are compared within a tolerance. Which candidates go on is decided by the scores that were reported, and
        compared exactly: a near tie cannot fail the test.
        """
        near = 1e-4
        beam: list[tuple[int, Row]] = [(-1, rows[-1])]  # candidate index, and the row that proposes its children
        at = 0
        for level in range(depth):
            first = at
            for candidate, row in beam:
                above = scores[candidate] if candidate >= 0 else 0.0
                logprobs = self.logprobs(row)
                children = range(at, at + k)
                assert [parents[i] for i in children] == [candidate] * k
                for i in children:
                    expected = min(above + logprobs[tokens[i]], above)
                    assert abs(scores[i] - expected) < near, (level, scores[i], expected)
                found = [logprobs.pop(tokens[i]) for i in children]  # pop: no child twice
                assert all(a >= b - near for a, b in pairwise(found))
                assert not logprobs or found[-1] >= max(logprobs.values()) - near
                at += k
            best = sorted(range(first, at), key=lambda i: (-scores[i], i))[:k]
            proposers = dict(beam)
            beam = []
            for i in best:
                above_row = proposers[parents[i]]
                sees = [*rows] if level == 0 else [*above_row.sees, above_row]
                beam.append((i, Row(tokens[i], self.output(above_row), rows[-1].position + 1 + level, sees)))
        assert at == len(tokens) == len(scores) == len(parents)
