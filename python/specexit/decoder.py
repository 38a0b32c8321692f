"""`SpecExitDecoder`: an unmodified transformers model, a draft that proposes and signals, and the rule that ends the
thinking.

    decoder = SpecExitDecoder.from_pretrained(base, draft)
    out = decoder.generate(input_ids, max_new_tokens=2048)
    model.generate(**inputs, custom_generate=decoder)  # the same, as a drop-in inside transformers
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
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
from specexit.call import Call
from specexit.config import TreeConfig, check_tree
from specexit.drafts import Draft, load_draft
from specexit.exit import ExitConfig
from specexit.generation import (
    Prepared,
    check_generation_config,
    check_model_kwargs,
    ending,
    generate_options,
    pad_id,
    prepare,
)
from specexit.job import Job
from specexit.loading import load_base, load_tokenizer
from specexit.loop import Loop
from specexit.memory import Memory
from specexit.output import Completion, GenerateOutput, RowStats, join_sequences
from specexit.plan import Exit, ExitPlanner, check_exit
from specexit.pool import Pool, batch_bucket
from specexit.processors import check_processors
from specexit.prompts import left_padded, pack_prompts
from specexit.sampling import row_seeds, seeds_of

Seed = int | Sequence[int] | None


class SpecExitDecoder:
    """Speculative decoding with early exit from thinking, over any transformers model that `check_supported` passes.

    model      the base, unchanged; the text is always its own
    draft      proposes tokens and reads exit signals; None decodes plainly (budgets still hold)
    tree       shape of the token trees that the draft grows; None takes one that suits the device and the batch
    exit       when thinking is cut, or one `ExitConfig` a prompt; None takes the draft's calibrated rule, or the
               defaults where it has none, if draft and tokenizer allow an exit at all
    tokenizer  tells which ids start and end thinking and which end a paragraph
    capacity   hard limit of cache slots a row, the tree's scratch slots included; None lets the cache grow
    graph      on a GPU, capture the decode step in a CUDA graph; False launches it from Python
    ahead      steps that are launched before what the last one published is read; None: 1 on a GPU, which so never
               waits for the host, 0 on a CPU

    On a GPU the decoder keeps the buffers and the captured steps of its last two kinds of calls, for the next one of
    their kind. `release` gives them back: do so when the model's forward has become another one (adapters switched,
    modules replaced, precision flags of torch set); weights that move are noticed.
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
        graph: bool = True,
        ahead: int | None = None,
    ) -> None:
        if draft is not None and not (hasattr(draft, "allocate") and hasattr(draft, "feature_layers")):
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
        if not isinstance(graph, bool):
            raise TypeError(f"graph must be a bool, was {type(graph).__name__}")
        if ahead is not None:
            checks.integer("ahead", ahead, 0)
        probe(self.base)
        self.draft = draft
        self.tokenizer = tokenizer
        self.capacity = capacity
        self.tree = tree
        self.ahead = ahead if ahead is not None else int(self.base.device.type == "cuda")
        self._lock = self.base.lock  # also while the draft selects a source
        self.planner = ExitPlanner(draft, tokenizer, self.base.vocab_size, self._lock)
        self.exit: Exit = self.planner.default(model) if exit is None else exit
        self._pool = Pool(self.base, draft, capacity, graph)
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
        calibrated: bool = True,
        **options: Any,
    ) -> SpecExitDecoder:
        """Load base and draft from paths, hub ids or modules.

        dtype         of a base that is loaded here; None: as the checkpoint stores it on a GPU, float32 on a CPU (where
                      bfloat16 is slow)
        device        where it goes; None: the GPU if there is one
        allow_pickle  accept a base or a draft that is not stored as safetensors
        calibrated    read the draft's calibration.json, if it has one
        options       those of the constructor: tree, exit, capacity, graph, ahead
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
                draft,
                embedding=embedding,
                dtype=weight.dtype,
                device=weight.device,
                allow_pickle=allow_pickle,
                calibrated=calibrated,
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
            ids, mask = left_padded(prompts, pad_id(self.model.generation_config))
            prepared = prepare(self.model, ids.to(self.device), mask.to(self.device), options)
            new_tokens, stats = self._decode(prepared, seed, streamer, exit, tree)
            # One row each, also where the generation_config asks for several sequences a prompt.
            input_ids = input_ids.repeat_interleave(len(stats) // len(prompts.lengths), 0)
            sequences = join_sequences(input_ids, new_tokens, pad_id(self.model.generation_config))
            return GenerateOutput(sequences, new_tokens, stats)

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
        prepared = Prepared(input_ids, mask, logits_processor, stopping_criteria, generation_config)
        with ending(streamer), self._lock:
            new_tokens, stats = self._decode(prepared, seed, streamer, exit, tree)
        sequences = join_sequences(input_ids, new_tokens, pad_id(generation_config))
        if generation_config.return_dict_in_generate:
            output = GenerateDecoderOnlyOutput(sequences=sequences)
            output.stats = stats
            return output
        return sequences

    def streaming(self, streamer: BaseStreamer) -> Callable[..., Any]:
        """`model.generate(..., custom_generate=decoder.streaming(streamer))`: the drop-in with a streamer. One that is
        given to `model.generate` itself gets the prompt, and then nothing: transformers does not pass it on."""
        return partial(self, streamer=streamer)

    def generate_many(
        self,
        prompts: Iterable[Sequence[int] | Tensor],
        *,
        slots: int = 8,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: Seed = None,
        eos_token_id: int | Sequence[int] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        exit: ExitConfig | None = None,
        tree: TreeConfig | None = None,
    ) -> Iterator[Completion]:
        """Continue any number of prompts, `slots` at a time: as a sequence ends, the next prompt takes its place.

        prompts  ids of one prompt each, without padding; taken as slots become free, so they need not end. All free
                 slots are filled before decoding goes on: a source must not wait for a result while one is free
        slots    sequences that are decoded at a time; a slot that is free costs as much as one that is not
        The others are those of `generate`, and each text is what it gives for that prompt alone (with an exit in its
        default granularity) and with that sequence's seed: given, of which more than are needed do no harm, or derived
        from one int and its number. Sequences are counted over all prompts.

        Yields completions as they end, `index` telling the prompt. A prompt that cannot be decoded raises, when those
        that are being decoded have ended. Raises TypeError or ValueError for another argument.
        """
        checks.integer("slots", slots, 1)
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise TypeError(f"prompts must be an iterable over prompts, each its ids, was {type(prompts).__name__}")
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
        check_processors(logits_processor or [], several=True)
        call = self._call(exit, tree, slots)
        if not isinstance(call.exit, ExitConfig):
            raise TypeError(f"exit must be one ExitConfig for all prompts, was {type(call.exit).__name__}")
        return self._complete(call, call.jobs_of(prompts, seeds_of(seed), options))

    def tree_for(self, batch: int, tree: TreeConfig | None = None) -> TreeConfig:
        """The tree that `batch` sequences at a time are decoded with, unless a call names another."""
        if tree is not None:
            check_tree(tree)
        if self.draft is None:  # which would grow it
            return TreeConfig.none()
        return tree or self.tree or TreeConfig.suited_to(self.device, batch)

    def memory(self) -> Memory:
        """Bytes that the decoder holds: weights, and what it keeps between calls or uses now."""
        return self._pool.memory()

    def release(self) -> None:
        """Give back the memory that is kept for the next call; weights stay."""
        self._pool.release()

    def _call(self, exit: Exit | None, tree: TreeConfig | None, slots: int) -> Call:
        exit = self.exit if exit is None else exit
        return Call(self.base, self.planner, exit, self.tree_for(slots, tree), self.capacity, slots)

    def _decode(
        self,
        prepared: Prepared,
        seed: Seed,
        streamer: BaseStreamer | None,
        exit: Exit | None,
        tree: TreeConfig | None,
    ) -> tuple[list[list[int]], list[RowStats]]:
        """Decode what transformers prepared, its configuration checked: the new tokens of each row, and how they came
        about."""
        batch = prepared.input_ids.shape[0]
        if not batch:
            return [], []
        if streamer is not None and batch > 1:
            raise ValueError(f"streamer must be given one prompt, was given {batch}")
        call = self._call(exit, tree, batch_bucket(batch, self.device))
        jobs = call.jobs(prepared, row_seeds(seed, batch), streamer=streamer)
        if streamer is not None:
            streamer.put(prepared.input_ids.cpu())
        with self._pool.take(call, max(job.length for job in jobs)) as engine, engine.active():
            loop = Loop(engine, iter(jobs), call.ahead(self.ahead))
            loop.feed()
            while loop.run():
                pass
        return [job.new_tokens for job in jobs], [call.stats(job) for job in jobs]

    def _complete(self, call: Call, jobs: Iterator[Job]) -> Iterator[Completion]:
        """Decode jobs and yield what has ended. Between two results the decoder is free for other calls."""
        first = next(jobs, None)
        if first is None:
            return
        with self._pool.take(call, first.length) as engine:
            loop = Loop(engine, chain([first], jobs), call.ahead(self.ahead))
            while True:
                loop.feed()
                with self._lock, engine.active():
                    ended = loop.run()
                if not ended:
                    return
                for job in ended:
                    yield Completion(job.index, job.new_tokens, call.stats(job))
