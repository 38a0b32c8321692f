"""`SpecExitDecoder`: an unmodified transformers model, a draft that proposes and signals, and the rule that ends the
thinking.

    decoder = SpecExitDecoder.from_pretrained(base, draft)
    out = decoder.generate(input_ids, max_new_tokens=2048)
    model.generate(**inputs, custom_generate=decoder)  # the same, as a drop-in inside transformers
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from specexit import checks
from specexit.base import BaseModel, check_supported, probe
from specexit.config import TreeConfig, check_tree
from specexit.drafts import Draft, load_draft
from specexit.generation import (
    check_generation_config,
    check_model_kwargs,
    ending,
    generate_options,
    pad_id,
    row_limits,
    split_criteria,
)
from specexit.loading import load_base, load_tokenizer
from specexit.loop import Request, decode
from specexit.output import GenerateOutput, join_sequences
from specexit.plan import Exit, ExitPlanner, check_exit
from specexit.processors import PathProcessor, check_processors, split_warpers
from specexit.prompts import left_padded, pack_prompts
from specexit.sampling import Sampler, row_seeds
from specexit.step import Choose

Seed = int | Sequence[int] | None


class SpecExitDecoder:
    """Speculative decoding with early exit from thinking, over any transformers model that `check_supported` passes.

    model      the base, unchanged; the text is always its own
    draft      proposes tokens and reads exit signals; None decodes plainly (budgets still hold)
    tree       shape of the token trees that the draft grows; None takes one that suits the device
    exit       when thinking is cut, or one `ExitConfig` a prompt; None takes the draft's calibrated rule, or the
               defaults where it has none, if draft and tokenizer allow an exit at all
    tokenizer  tells which ids start and end thinking and which end a paragraph
    capacity   hard limit of cache slots a row, the tree's scratch slots included; None lets the cache grow

    Raises TypeError or ValueError for a model or draft that does not fit, naming the reason.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft: Draft | None = None,
        *,
        tree: TreeConfig | None = None,
        exit: Exit | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        capacity: int | None = None,
    ) -> None:
        if draft is not None and not (hasattr(draft, "propose") and hasattr(draft, "observe")):
            raise TypeError(f"draft must be a path, a hub id or a Draft, was {type(draft).__name__}")
        self.base = BaseModel(model, () if draft is None else draft.feature_layers)
        if draft is not None and draft.feature_size != self.base.feature_size:
            raise ValueError(
                f"draft must read features of {self.base.feature_size} numbers, from layers "
                f"{self.base.feature_layers} of this base, was made for {draft.feature_size}"
            )
        if capacity is not None:
            checks.integer("capacity", capacity, 1)
        if tree is not None:
            check_tree(tree)
        if exit is not None:
            check_exit(exit)
        probe(self.base)
        self.draft = draft
        self.tokenizer = tokenizer
        self.capacity = capacity
        self.tree = tree or TreeConfig.suited_to(self.base.device)
        self.planner = ExitPlanner(draft, tokenizer, self.base.vocab_size)
        self.exit: Exit = self.planner.default() if exit is None else exit
        self._lock = RLock()  # model and draft hold one batch at a time
        if exit is None and tokenizer is None and draft is not None and draft.signals:
            warnings.warn(
                "the draft has exit signals, but without a tokenizer nothing tells where thinking and its paragraphs "
                "end: the exit is off. Give tokenizer=, or exit= with the ids or as ExitConfig.off()",
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        draft: str | os.PathLike[str] | Draft | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> SpecExitDecoder:
        """Load base and draft from paths, hub ids or modules.

        dtype         of a base that is loaded here; None: as the checkpoint stores it on a GPU, float32 on a CPU (where
                      bfloat16 is slow)
        device        where it goes; None: the GPU if there is one
        allow_pickle  accept a base or a draft that is not stored as safetensors
        options       those of the constructor: tree, exit, capacity
        """
        if isinstance(base, (str, os.PathLike)):
            model = load_base(base, dtype, device, allow_pickle)
            tokenizer = tokenizer or load_tokenizer(base)
        else:
            if dtype is not None or device is not None:
                raise ValueError("dtype and device must be None for a base that is loaded: it stays as it is")
            check_supported(base)
            model = base
        if isinstance(draft, (str, os.PathLike)):
            embedding = model.get_input_embeddings()
            weight = embedding.weight
            draft = load_draft(
                draft, embedding=embedding, dtype=weight.dtype, device=weight.device, allow_pickle=allow_pickle
            )
        return cls(model, draft, tokenizer=tokenizer, **options)

    @property
    def model(self) -> PreTrainedModel:
        return self.base.model

    @property
    def device(self) -> torch.device:
        return self.base.device

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: Seed = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        exit: Exit | None = None,
        tree: TreeConfig | None = None,
    ) -> GenerateOutput:
        """Continue the prompts; what is not given comes from the model's `generation_config`, as in `model.generate`.

        input_ids          [B, P] integers on any device, padded on either side where `attention_mask` [B, P] is 0
        temperature        0 is greedy; a positive one samples
        seed               of the sampling: an int (rows get seeds derived from it), one a row, or None for a fresh one
        logits_processor   run along the accepted path, on the host, one row at a time
        stopping_criteria  asked after every token of every row
        streamer           gets the prompt, then every token as it is published; one prompt only
        exit, tree         instead of the decoder's

        Greedy text, and sampled text of the same seeds, do not depend on the tree, the draft or the batch; an exit
        (in its default granularity) does not depend on how tokens were speculated.
        Raises TypeError or ValueError for an argument that is wrong, before anything is decoded.
        """
        with ending(streamer), self._lock:
            prompts = pack_prompts(input_ids, attention_mask, self.base.vocab_size)
            options = generate_options(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
            )
            if not prompts.lengths:
                return GenerateOutput(input_ids.long(), [], [])
            results: list[GenerateOutput] = []

            # transformers merges the generation_config and builds the processors and criteria, so that every option
            # means here what it means there; then it calls this.
            def run(
                model: PreTrainedModel,
                input_ids: Tensor,
                logits_processor: LogitsProcessorList,
                stopping_criteria: StoppingCriteriaList,
                generation_config: GenerationConfig,
                **rest: Any,
            ) -> Tensor:
                check_generation_config(generation_config)
                prepared = (logits_processor, stopping_criteria, generation_config)
                mask = rest.get("attention_mask")
                results.append(self._decode(input_ids, mask, *prepared, seed, streamer, exit, tree))
                return results[0].sequences

            pad = pad_id(self.model.generation_config)
            ids, mask = (tensor.to(self.device) for tensor in left_padded(prompts, pad))
            self.model.generate(input_ids=ids, attention_mask=mask, custom_generate=run, **options)
            result = results[0]
            # One row each, also where the generation_config asks for several sequences a prompt.
            input_ids = input_ids.repeat_interleave(len(result.stats) // len(prompts.lengths), 0)
            return GenerateOutput(join_sequences(input_ids, result.new_tokens, pad), result.new_tokens, result.stats)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        seed: Seed = None,
        exit: Exit | None = None,
        tree: TreeConfig | None = None,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """The decoding method of `model.generate(..., custom_generate=decoder)`; `seed`, `exit` and `tree` may be given
        there as well. transformers keeps its streamer to itself: see `streaming`."""
        if model is not self.model:
            raise ValueError("custom_generate must be a decoder made for this very model, was one made for another")
        check_generation_config(generation_config)
        check_model_kwargs(model_kwargs, input_ids)
        mask = model_kwargs.get("attention_mask")
        prepared = (logits_processor, stopping_criteria, generation_config)
        with ending(streamer), self._lock:
            result = self._decode(input_ids, mask, *prepared, seed, streamer, exit, tree)
        if generation_config.return_dict_in_generate:
            output = GenerateDecoderOnlyOutput(sequences=result.sequences)
            output.stats = result.stats
            return output
        return result.sequences

    def streaming(self, streamer: BaseStreamer) -> Callable[..., Any]:
        """`model.generate(..., custom_generate=decoder.streaming(streamer))`: the drop-in with a streamer. One that is
        given to `model.generate` itself gets the prompt, and then nothing: transformers does not pass it on."""
        return partial(self, streamer=streamer)

    def _decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        seed: Seed,
        streamer: BaseStreamer | None,
        exit: Exit | None,
        tree: TreeConfig | None,
    ) -> GenerateOutput:
        """Decode what transformers prepared: left-padded ids, merged configuration, processors and criteria, of which
        the configuration is checked."""
        if torch.is_autocast_enabled(self.device.type):
            raise RuntimeError("autocast must be off: the base and its cache have one dtype; load the model in another")
        if not input_ids.shape[0]:
            return GenerateOutput(input_ids, [], [])
        if streamer is not None and input_ids.shape[0] > 1:
            raise ValueError(f"streamer must be given one prompt, was given {input_ids.shape[0]}")
        tree = self.tree if tree is None else check_tree(tree)
        if self.draft is None:  # which would grow it
            tree = TreeConfig.none()
        prompts = pack_prompts(input_ids.to(self.device), attention_mask, self.base.vocab_size)
        stop_ids, longest, others = split_criteria(criteria, config, self.base.vocab_size)
        wanted = [length + longest - input_ids.shape[1] for length in prompts.lengths]
        limits = row_limits(
            prompts.lengths, wanted, positions=self.base.max_positions, capacity=self.capacity, nodes=tree.nodes
        )
        plan = self.planner.plan(self.exit if exit is None else exit, prompts, stop_ids, self.device)
        seeds = row_seeds(seed, len(wanted))
        sampling, processors = split_warpers(list(processors), bool(config.do_sample))
        prefixes: list[list[int]] = input_ids.tolist()
        sampler = Sampler(sampling, seeds, self.device)
        check_processors(processors, len(wanted))
        choose: Choose = PathProcessor(processors, sampler, prefixes, set(stop_ids)) if processors else sampler
        request = Request(
            prompts=prompts,
            prefixes=prefixes,
            limits=limits,
            slots=self.capacity,
            stop_ids=stop_ids,
            choose=choose,
            rules=plan.rules,
            thinking=plan.thinking,
            trace=plan.reads_signals,
            criteria=others,
            streamer=streamer,
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        rows = decode(self.base, self.draft, tree, request)
        new_tokens = [prefix[input_ids.shape[1] :] for prefix in prefixes]
        for index, row in enumerate(rows):
            row.thinking_tokens = plan.count_thinking(index, new_tokens[index])
            if row.finish_reason == "length" and limits[index] < wanted[index]:
                row.finish_reason = "capacity"
        return GenerateOutput(join_sequences(input_ids, new_tokens, pad_id(config)), new_tokens, rows)
