"""The models whose decode step is measured: their shapes, from their public config.json files, with random weights.

Nothing is downloaded. A base is built on the device that it is measured on, with an EAGLE-3 draft whose one layer has
the base's sizes, which proposes 32,000 of the base's tokens and reads the three exit signals from its output.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from specexit.drafts.eagle3 import Eagle3Draft
from specexit.drafts.eagle3_config import Eagle3Config

SIGNALS = 3  # confidence, progress, remaining length
SHARPNESS = 3.0  # standard deviation of a query's product with a key: a wrong mask or position is seen in the logits


@dataclass(frozen=True)
class Model:
    """A base and its draft.

    family            of transformers' classes: "Qwen3" or "Llama"
    head_norms        queries and keys are normed by head
    tied              the head's matrix is the embedding's
    draft_vocabulary  tokens that the draft can propose
    feature_layers    layers whose inputs the draft reads; None: EAGLE-3's three
    rope              transformers' `rope_parameters`
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    head_norms: bool
    tied: bool
    draft_vocabulary: int = 32_000
    feature_layers: tuple[int, ...] | None = None
    rope: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    @property
    def head(self) -> int:
        """Weights of the matrix that makes the logits; the embedding has as many."""
        return self.vocabulary * self.hidden

    @property
    def matrices(self) -> int:
        """Weights that a forward multiplies every row with: of the layers, and the head."""
        return self.layers * self._layer(self.hidden) + self.head

    @property
    def parameters(self) -> int:
        """All of the base's weights."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        embedding = 0 if self.tied else self.head
        return self.matrices + embedding + self.layers * norms + self.hidden

    @property
    def draft_projection(self) -> int:
        """Weights of the draft that read the base's features."""
        return 3 * self.hidden * self.hidden

    @property
    def draft_head(self) -> int:
        """Weights that make the draft's logits and its signals."""
        return (self.draft_vocabulary + SIGNALS) * self.hidden

    @property
    def draft_layer(self) -> int:
        """Weights of the draft's layer, which reads a token's embedding beside a feature."""
        return self._layer(2 * self.hidden)

    @property
    def slot(self) -> int:
        """Entries of one slot of the base's cache, keys and values of all layers."""
        return self.layers * self.draft_slot

    @property
    def draft_slot(self) -> int:
        """Entries of one slot of the draft's cache, which has one layer of the same heads."""
        return 2 * self.kv_heads * self.head_dim

    def _layer(self, width: int) -> int:
        """Weights of the matrices of a layer whose attention reads rows of this width."""
        attention = width * (self.heads + 2 * self.kv_heads) * self.head_dim
        return attention + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.intermediate

    def config(self) -> PretrainedConfig:
        """As its config.json has it."""
        return getattr(transformers, f"{self.family}Config")(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.positions,
            rms_norm_eps=self.epsilon,
            tie_word_embeddings=self.tied,
            rope_parameters=dict(self.rope),
        )

    def draft_config(self) -> Eagle3Config:
        """Of the draft."""
        return Eagle3Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            draft_vocab_size=self.draft_vocabulary,
            target_hidden_size=self.hidden,
            rope_parameters=dict(self.rope),
            rms_norm_eps=self.epsilon,
            max_position_embeddings=self.positions,
            feature_layers=self.feature_layers,
            exit_head={},
        )


class Pair(NamedTuple):
    """A model with its draft, on a device."""

    base: PreTrainedModel
    draft: Eagle3Draft


_HELD: dict[object, Pair] = {}  # the last pair: building one takes seconds, and two may not fit in memory


def pair(model: Model, device: torch.device, dtype: torch.dtype) -> Pair:
    """The model with random weights; the one before it is freed."""
    key = model, device, dtype
    if key not in _HELD:
        free()
        _HELD[key] = build(model, device, dtype)
    return _HELD[key]


def free() -> None:
    """Let go of the pair that is held."""
    _HELD.clear()
    gc.collect()  # modules and hooks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Pair:
    """Random weights, made where they stay; the same ones in every process on a device. They keep a row's variance,
    at any hidden size."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(model.config(), dtype=dtype).eval()
        draft = Eagle3Draft(model.draft_config(), base.get_input_embeddings())
        for name, weight in (*base.named_parameters(), *draft.named_parameters()):
            if "norm" in name or weight.dim() == 1:
                weight.detach().fill_(1)
            else:
                weight.detach().normal_(0, model.hidden**-0.5)
        for layer in base.get_decoder().layers:
            attention = layer.self_attn
            (attention.q_norm if model.head_norms else attention.q_proj).weight.detach().mul_(SHARPNESS)
        # As in a published draft, whose tokens are spread over the base's: the map is read.
        tokens = torch.arange(model.draft_vocabulary, dtype=torch.int32)
        draft.d2t = tokens * (model.vocabulary // model.draft_vocabulary - 1)
    return Pair(base, draft)


QWEN3_4B = Model(
    "Qwen3-4B",
    "Qwen3",
    hidden=2560,
    intermediate=9728,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151_936,
    positions=40_960,
    epsilon=1e-6,
    head_norms=True,
    tied=True,
    rope={"rope_type": "default", "rope_theta": 1_000_000.0},
)
QWEN3_8B = replace(QWEN3_4B, name="Qwen3-8B", hidden=4096, intermediate=12_288, tied=False)
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_8B, DEEPSEEK_8B = (
    Model(
        name,
        "Llama",
        hidden=4096,
        intermediate=14_336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocabulary=128_256,
        positions=131_072,
        epsilon=1e-5,
        head_norms=False,
        tied=False,
        rope=LLAMA_ROPE,
    )
    for name in ("Llama-3.1-8B", "DeepSeek-R1-Distill-Llama-8B")  # one is the other, trained on
)
MODELS = (QWEN3_4B, QWEN3_8B, LLAMA_8B, DEEPSEEK_8B)


def _small(name: str, family: str, tied: bool) -> Model:
    """Of a size for any machine."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    sizes = {"hidden": 64, "intermediate": 96, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
    return Model(
        name,
        family,
        **sizes,
        vocabulary=1000,
        positions=4096,
        epsilon=1e-6,
        head_norms=family == "Qwen3",
        tied=tied,
        draft_vocabulary=250,
        feature_layers=(0, 1, 1),
        rope=rope,
    )


SMALL_QWEN, SMALL_LLAMA = _small("small Qwen3", "Qwen3", True), _small("small Llama", "Llama", False)
