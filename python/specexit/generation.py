"""What transformers' generation settings ask of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from specexit import checks
from specexit.config import MAX_NODES
from specexit.sampling import SamplingConfig

_LAST_LIMIT = checks.INT32_MAX - MAX_NODES  # positions are int32 on the device, and a tree reaches past the last one
# What transformers itself adds to the arguments of the model.
_HARMLESS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
_UNSUPPORTED = {
    "output_scores": "per-token scores are not kept",
    "output_logits": "logits are not kept",
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "hidden states are not kept",
    "prompt_lookup_num_tokens": "the decoder has its own draft",
    "penalty_alpha": "contrastive search looks ahead in its own way",
    "dola_layers": "DoLa reads several layers' logits",
    "use_mtp": "the decoder has its own draft",
}


@dataclass(frozen=True)
class Prepared:
    """What transformers made of the options for a batch.

    input_ids       [B, P] int64, padded on the left
    attention_mask  [B, P], or None
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig


def prepare(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any]) -> Prepared:
    """Let transformers merge the generation_config and build processors and criteria, so that every option means here
    what it means there. Raises ValueError for what speculative decoding cannot honour."""
    found: list[Prepared] = []

    def keep(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> Tensor:
        check_generation_config(generation_config)
        mask = rest.get("attention_mask")
        found.append(Prepared(input_ids, mask, logits_processor, stopping_criteria, generation_config))
        return input_ids

    model.generate(input_ids=input_ids, attention_mask=attention_mask, custom_generate=keep, **options)
    return found[0]


def generate_options(
    *,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    max_new_tokens: int | None,
    eos_token_id: int | Sequence[int] | None,
    **others: Any,
) -> dict[str, Any]:
    """The options of `decoder.generate` as `model.generate` takes them; None leaves one to the generation_config.

    Raises TypeError or ValueError for a value that cannot be, naming it.
    """
    SamplingConfig(0.0 if temperature is None else temperature, top_k, top_p, min_p)  # which checks them
    if max_new_tokens is not None:
        checks.integer("max_new_tokens", max_new_tokens, 1)
    for name in ("logits_processor", "stopping_criteria"):
        if not isinstance(others.get(name, []) or [], list):
            raise TypeError(f"{name} must be a list, as transformers' are, was {type(others[name]).__name__}")
    for index in ids_of(eos_token_id):
        checks.integer("eos_token_id", index, -1)  # -1: none of the ids that a model emits
    options = {
        "do_sample": None if temperature is None else temperature > 0,
        "temperature": float(temperature) if temperature else None,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": eos_token_id,
        **others,
    }
    return {name: value for name, value in options.items() if value is not None}


def check_generation_config(config: GenerationConfig) -> None:
    """Refuse what speculative decoding of one sequence a row cannot honour. Raises ValueError."""
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams must be 1, was {config.num_beams}: beams are not decoded speculatively")
    for name, reason in _UNSUPPORTED.items():
        if getattr(config, name, None):
            raise ValueError(f"{name} must not be set, was {getattr(config, name)}: {reason}")


def split_criteria(
    criteria: StoppingCriteriaList, config: GenerationConfig, vocabulary: int
) -> tuple[list[int], int, StoppingCriteriaList]:
    """Stop ids and the maximal length (padding included), which the device checks, and the criteria in Python.

    A configuration may name ids outside the vocabulary, which no model emits: they are left out.
    """
    stops = set(ids_of(config.eos_token_id))
    longest = int(config.max_length or 0)
    rest = StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            longest = min(longest or criterion.max_length, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            stops.update(ids_of(criterion.eos_token_id.tolist()))
        else:
            rest.append(criterion)
    return sorted(stop for stop in stops if 0 <= stop < vocabulary), longest, rest


def row_limits(
    lengths: Sequence[int],
    wanted: Sequence[int],
    *,
    name: str = "input_ids",
    positions: int | None,
    capacity: int | None,
    nodes: int,
) -> list[int]:
    """Where each row must end: as wanted, or where a hard capacity has no room for another tree.

    lengths    of the prompts
    wanted     the longest that each row may become
    name       what errors call the prompts
    positions  that the base may reach; None: any
    capacity   cache slots a row; None: any
    nodes      slots that a tree needs

    Raises ValueError where a row cannot be decoded at all.
    """
    wanted = [min(limit, _LAST_LIMIT) for limit in wanted]
    if positions is not None and max(wanted) > positions:
        raise ValueError(
            f"{name} and max_new_tokens must stay within {positions} positions, was {max(wanted)}: past them "
            "this base changes its rotary embedding (longrope) for the whole text"
        )
    if capacity is None:
        return wanted
    most = capacity - nodes + 1
    if max(lengths) >= most:
        raise ValueError(
            f"{name} must leave room in the capacity of {capacity} slots for a tree of {nodes} "
            f"nodes and one token: prompts up to {max(most - 1, 0)} tokens, was {max(lengths)}"
        )
    return [min(limit, most) for limit in wanted]


def ids_of(value: int | Sequence[int] | Tensor | None) -> list[int]:
    """One id, several or none, as transformers' configurations give them."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        return list(value.reshape(-1).tolist())
    return list(value) if isinstance(value, (list, tuple)) else [value]  # type: ignore[list-item]


def pad_id(config: GenerationConfig | None) -> int:
    """What fills a rectangle: the pad id, else the first end of sequence, else 0."""
    for value in (config.pad_token_id, config.eos_token_id) if config is not None else ():
        if ids := ids_of(value):
            return ids[0]
    return 0


def check_model_kwargs(given: Mapping[str, Any], input_ids: Tensor) -> None:
    """Refuse what `generate` hands to the model besides ids and mask: the decoder would decode as if it were not there.

    Raises ValueError.
    """
    for name, value in given.items():
        if value is not None and name not in _HARMLESS:
            raise ValueError(f"{name} must not be given: the base is driven by token ids and their mask alone")
    positions, cache, mask = given.get("position_ids"), given.get("past_key_values"), given.get("attention_mask")
    if positions is not None:
        seen = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.dtype)
        if not ((positions == seen.cumsum(1) - 1) | (seen == 0)).all():
            raise ValueError("position_ids must be left out: a token's position is its place in the prompt")
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"past_key_values must be empty, held {cache.get_seq_length()} positions: give the whole text")


@contextmanager
def ending(streamer: BaseStreamer | None) -> Iterator[None]:
    """End the stream after the block, after an error too: another thread may be waiting for the next token.

    Raises TypeError for what is no streamer.
    """
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"streamer must have put and end as transformers' have, was {type(streamer).__name__}")
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()
