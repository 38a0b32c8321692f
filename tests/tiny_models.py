"""Tiny random models of many architectures, real transformers classes all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 199
WINDOW = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 3


def _config(name: str, **options: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**{**_COMMON, **options})


ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("Llama"),
    "llama3_rope": _config(
        "Llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": _config("Qwen2"),
    "qwen2_window": _config("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": _config("Qwen3", head_dim=32),
    "mistral_window": _config("Mistral", sliding_window=WINDOW),
    "phi3": _config("Phi3"),
    "gemma2": _config(
        "Gemma2", head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "gemma3": _config(
        "Gemma3Text", head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, layer_types=_ALTERNATING
    ),
    "olmo2": _config("Olmo2"),
    "granite": _config("Granite"),
    "gpt_oss": _config(
        "GptOss",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
    ),
    "mixtral": _config("Mixtral", num_local_experts=4),
    "starcoder2": _config("Starcoder2"),
    "gpt_neox": _config("GPTNeoX"),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=6, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model. Weights are larger than at initialisation, so that the next token depends on the text."""
    torch.manual_seed(seed)
    # transformers 5.17 runs Gemma 2 through SDPA, which leaves the softcap out; later releases do not.
    attention = "eager" if name == "gemma2" else None
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name](), attn_implementation=attention).eval().float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model
