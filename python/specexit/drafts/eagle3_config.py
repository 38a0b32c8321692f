"""The config.json of an EAGLE-3 draft, in the forms in which it is published.

- EAGLE-3, AngelSlim and SpecForge: a flat Llama config with `draft_vocab_size`; AngelSlim adds `early_stop_method`.
- vLLM speculators: the same keys under `transformer_layer_config`, and `speculators_model_type: eagle3`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from specexit.drafts.rope import parse_rope
from specexit_kernels.state import SIGNALS

# The signals that the rows of `fc` behind the hidden ones hold, by AngelSlim's `early_stop_method`.
FC_SIGNALS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "confidence": ("confidence",),
    "progress": ("progress",),
    "remain": ("remaining",),
    "confidence_progress_remain": SIGNALS,
}
Source = Literal["fc", "output"]  # where exit signals are read: rows of the feature projection, or the layer's output
ARCHITECTURES = ["LlamaForCausalLMEagle3"]


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes and settings of an EAGLE-3 draft: one Llama layer over the base's features.

    target_hidden_size     H of the base: `fc` reads three features of that size
    vocab_size             the base's; draft_vocab_size: the ids that the draft can propose
    feature_layers         layers of the base whose inputs are the features; None: the usual 2, N // 2, N - 3
    early_stop_method      which signals `fc` carries: a key of FC_SIGNALS
    exit_head              what the config says of the signals on the layer's output (thresholds, meaning); None: there
                           is no such head
    norm_before_residual   the residual is the normed feature (speculators), not the raw one (EAGLE-3)
    extra                  the file's other keys, kept for writing it back
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_before_residual: bool = False
    feature_layers: tuple[int, ...] | None = None
    early_stop_method: str | None = None
    exit_head: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, "
                f"were {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, was {self.head_dim}")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} exceeds vocab_size {self.vocab_size}")
        if self.early_stop_method not in list(FC_SIGNALS):  # a list: the value may be unhashable
            raise ValueError(f"early_stop_method must be one of {list(FC_SIGNALS)}, was {self.early_stop_method!r}")
        if self.feature_layers is not None and len(self.feature_layers) != 3:
            raise ValueError(f"three feature layers are needed, were {list(self.feature_layers)}")

    @property
    def fc_signals(self) -> tuple[str, ...]:
        """The signals that the last rows of `fc` hold."""
        return FC_SIGNALS[self.early_stop_method]

    def resolve_source(self, source: str) -> Source | None:
        """Where signals are read when `source` is asked for; "auto": the output, else fc, else None: there are none."""
        there = {"output": self.exit_head is not None, "fc": bool(self.fc_signals)}
        if source == "auto":
            return "output" if there["output"] else "fc" if there["fc"] else None
        if source not in there:
            raise ValueError(f"source must be 'fc', 'output' or 'auto', was {source!r}")
        if not there[source]:
            raise ValueError(f"source {source!r}: this draft has no exit signals there")
        return "output" if source == "output" else "fc"

    @staticmethod
    def read(path: Path) -> Eagle3Config:
        """The config in the file `path`. Raises FileNotFoundError, or ValueError that names the file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} does not exist: a draft checkpoint needs its config.json") from None
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a JSON object, was {type(content).__name__}")
        try:
            return Eagle3Config.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Eagle3Config:
        """The config in a parsed config.json of any of the layouts. Raises ValueError that names the key."""
        flat = _flatten(content)
        _refuse(flat)
        hidden_size, heads = _size(flat, "hidden_size"), _size(flat, "num_attention_heads")
        vocab_size = _size(flat, "vocab_size")
        return Eagle3Config(
            hidden_size=hidden_size,
            intermediate_size=_size(flat, "intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=_size(flat, "num_key_value_heads", heads),
            head_dim=_size(flat, "head_dim", hidden_size // heads),
            vocab_size=vocab_size,
            draft_vocab_size=_size(flat, "draft_vocab_size", vocab_size),
            target_hidden_size=_size(flat, "target_hidden_size", hidden_size),
            rope_parameters=parse_rope(flat),
            rms_norm_eps=_epsilon(flat),
            max_position_embeddings=_size(flat, "max_position_embeddings", 2048),
            attention_bias=bool(flat.get("attention_bias", False)),
            mlp_bias=bool(flat.get("mlp_bias", False)),
            norm_before_residual=bool(flat.get("norm_before_residual", False)),
            feature_layers=_feature_layers(flat),
            early_stop_method=flat.get("early_stop_method"),
            exit_head=_exit_head(flat),
            extra=flat,
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json of the EAGLE-3 layout; keys that mean nothing here are those that were read."""
        known: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
        }
        # The older rope keys: what every loader of this layout reads.
        known["rope_theta"] = self.rope_parameters["rope_theta"]
        scaling = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        optional = {
            "rope_scaling": scaling if scaling["rope_type"] != "default" else None,
            "target_hidden_size": self.target_hidden_size if self.target_hidden_size != self.hidden_size else None,
            "target_layer_ids": None if self.feature_layers is None else list(self.feature_layers),
            "early_stop_method": self.early_stop_method,
            "exit_head": None if self.exit_head is None else dict(self.exit_head),
            "norm_before_residual": self.norm_before_residual or None,
        }
        extra = {key: value for key, value in self.extra.items() if key not in optional and key != "rope_parameters"}
        return {
            "architectures": ARCHITECTURES,
            "model_type": "llama",
            **extra,
            **known,
            **{key: value for key, value in optional.items() if value is not None},
        }


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """A speculators config as the flat one of EAGLE-3; any other as it is."""
    if "speculators_model_type" not in content and "transformer_layer_config" not in content:
        return dict(content)
    kind = content.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise ValueError(f"speculators_model_type must be 'eagle3', was {kind!r}")
    layer = content.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise ValueError(f"transformer_layer_config must be an object, was {layer!r}")
    own = (
        "draft_vocab_size",
        "target_hidden_size",
        "norm_before_residual",
        "norm_before_fc",
        "eagle_aux_hidden_state_layer_ids",
        "early_stop_method",
    )
    flat = {**layer, **{key: content[key] for key in own if content.get(key) is not None}}
    flat["architectures"] = ARCHITECTURES  # those of the layer's config are the base's
    return flat


def _refuse(flat: Mapping[str, Any]) -> None:
    """Raise ValueError for a draft whose layer is not the one that is computed here."""
    wanted = {"num_hidden_layers": 1, "hidden_act": "silu", "norm_before_fc": False}
    for key, value in wanted.items():
        if flat.get(key, value) != value:
            raise ValueError(f"{key} must be {value!r} in an EAGLE-3 draft, was {flat[key]!r}")


def _size(flat: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of the config; null counts as absent."""
    value = flat.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{key} is missing")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a positive integer, was {value!r}")
    return value


def _epsilon(flat: Mapping[str, Any]) -> float:
    value = flat.get("rms_norm_eps", 1e-6)
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"rms_norm_eps must be a positive number, was {value!r}")
    return float(value)


def _exit_head(flat: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = flat.get("exit_head")
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"exit_head must be an object, was {value!r}")
    rules = (value or {}).get("thresholds_from_calibration", {})
    if not isinstance(rules, Mapping) or not all(isinstance(rule, Mapping) for rule in rules.values()):
        raise ValueError(f"exit_head.thresholds_from_calibration must be an object of objects, was {rules!r}")
    return value


def _feature_layers(flat: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Layers of the base whose inputs the draft reads; None where the config does not name them."""
    eagle_config = flat.get("eagle_config")
    if not isinstance(eagle_config, Mapping):
        eagle_config = {}
    # SpecForge and SGLang name a layer by its output, which is the input of the next one; vLLM names inputs.
    for source, key, shift in (
        (flat, "target_layer_ids", 0),
        (flat, "eagle_aux_hidden_state_layer_ids", 0),
        (eagle_config, "eagle_aux_hidden_state_layer_ids", 1),
    ):
        layers = source.get(key)
        if layers is None:
            continue
        if not isinstance(layers, list) or not all(type(i) is int and i >= 0 for i in layers):
            raise ValueError(f"{key} must be a list of layer numbers, was {layers!r}")
        return tuple(layer + shift for layer in layers)
    return None
