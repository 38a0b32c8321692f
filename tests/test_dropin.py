"""`model.generate(..., custom_generate=decoder)`: the text, options and errors of transformers' own decoding, and a
model that is afterwards what it was."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from oracle_draft import OracleDraft
from test_lossless import pad, prompts
from test_stopping import Recorder
from tiny_models import VOCAB, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from specexit import ExitConfig, SpecExitDecoder, TreeConfig

NEW = 12
TREE = TreeConfig(nodes=12, depth=4, top_k=3)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def model(llama: PreTrainedModel) -> PreTrainedModel:
    """One model for all tests, each with a generation_config of its own."""
    llama.generation_config = GenerationConfig(pad_token_id=0)
    return llama


def texts(model: PreTrainedModel, rows: list[torch.Tensor], new: int = NEW) -> list[list[int]]:
    """Each row and its greedy continuation, without any of the options under test."""
    ids, mask = pad(rows, "left")
    config = GenerationConfig(pad_token_id=0, max_new_tokens=new, do_sample=False)
    out = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
    return [row.tolist() + text for row, text in zip(rows, out, strict=True)]


def decoder_for(model: PreTrainedModel, rows: list[torch.Tensor], **options: object) -> SpecExitDecoder:
    options = {"exit": ExitConfig.off(), "tree": TREE, **options}
    return SpecExitDecoder(model, OracleDraft(texts(model, rows)), **options)


class Raising(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("criterion failed")


def footprint(model: PreTrainedModel) -> list[object]:
    """What decoding must leave as it was."""
    modules = list(model.modules())
    return [
        [id(getattr(module, "config", None)) for module in modules],
        [getattr(getattr(module, "config", None), "_attn_implementation", None) for module in modules],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules],
        [len(module._forward_pre_hooks_with_kwargs) for module in modules],
        [module.training for module in modules],
        copy.deepcopy(model.config.to_dict()),
        copy.deepcopy(model.generation_config.to_dict()),
        [parameter.requires_grad for parameter in model.parameters()],
    ]


@pytest.mark.parametrize("lengths", [[9], [5, 12, 1]], ids=["one", "left-padded"])
def test_text_is_that_of_generate(model: PreTrainedModel, lengths: list[int], rng: torch.Generator) -> None:
    rows = prompts(rng, lengths)
    ids, mask = pad(rows, "left")
    decoder = decoder_for(model, rows)
    stop = texts(model, rows)[0][lengths[0] + 4]
    for options in ({}, {"eos_token_id": stop}, {"max_length": ids.shape[1] + 3, "max_new_tokens": None}):
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        expected = model.generate(ids, attention_mask=mask, **options)
        out = model.generate(ids, attention_mask=mask, custom_generate=decoder, **options)
        assert torch.equal(out, expected)
        assert out.dtype == expected.dtype


def test_return_dict(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [6, 8])
    ids, mask = pad(rows, "left")
    options = {"attention_mask": mask, "max_new_tokens": NEW, "return_dict_in_generate": True}
    out = model.generate(ids, custom_generate=decoder_for(model, rows), **options)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert torch.equal(out.sequences, model.generate(ids, **options).sequences)
    assert [stats.new_tokens for stats in out.stats] == [NEW, NEW]


def test_a_mask_that_transformers_infers_is_honoured(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [4, 9])
    ids, _ = pad(rows, "left")
    out = model.generate(ids, max_new_tokens=NEW, custom_generate=decoder_for(model, rows))
    assert torch.equal(out, model.generate(ids, max_new_tokens=NEW))


def test_seed_exit_and_tree_pass_through_generate(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [7])
    decoder = SpecExitDecoder(model, exit=ExitConfig.off(), tree=TREE)
    options = {"max_new_tokens": NEW, "do_sample": True, "custom_generate": decoder, "return_dict_in_generate": True}
    out = model.generate(rows[0][None], seed=3, tree=TreeConfig.none(), **options)
    again = decoder.generate(rows[0][None], max_new_tokens=NEW, temperature=1.0, seed=3)
    assert torch.equal(out.sequences, again.sequences)
    assert out.stats[0].steps == NEW
    end = next(token for token in range(3, VOCAB) if token not in texts(model, rows)[0])
    budget = ExitConfig(
        enabled=False,
        thinking_budget=3,
        hard_budget=True,
        start_ids=(1,),
        end_ids=(end,),
        boundary_ids=(5,),
        assume_thinking=True,
    )
    out = model.generate(rows[0][None], exit=budget, **{**options, "do_sample": False})
    assert out.stats[0].exit_reason == "budget"
    assert out.sequences[0, 7 + 3] == end


def test_several_samples_of_a_prompt(model: PreTrainedModel, rng: torch.Generator) -> None:
    ids, mask = pad(prompts(rng, [7, 3]), "left")
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    options = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3}
    out = model.generate(ids, attention_mask=mask, custom_generate=decoder, seed=1, **options)
    assert out.shape == (6, ids.shape[1] + NEW)
    assert len({tuple(row) for row in out.tolist()}) == 6
    model.generation_config.update(**options)
    assert torch.equal(decoder.generate(ids, mask, seed=1).sequences, out)


def test_model_is_left_as_it_was(model: PreTrainedModel, rng: torch.Generator) -> None:
    rows = prompts(rng, [6])
    before = footprint(model)
    decoder = decoder_for(model, rows)
    assert footprint(model) == before, "after the probe"
    decoder.generate(rows[0][None], max_new_tokens=NEW, temperature=0.0)
    assert footprint(model) == before, "after success"
    criteria = StoppingCriteriaList([Raising()])
    for run in (
        lambda: decoder.generate(rows[0][None], max_new_tokens=NEW, stopping_criteria=criteria),
        lambda: model.generate(rows[0][None], max_new_tokens=NEW, stopping_criteria=criteria, custom_generate=decoder),
    ):
        with pytest.raises(RuntimeError, match="criterion failed"):
            run()
        assert footprint(model) == before, "after an exception"
    assert decoder.generate(rows[0][None], max_new_tokens=NEW).sequences[0].tolist() == texts(model, rows)[0]


def test_models_may_share_a_config(rng: torch.Generator) -> None:
    first = tiny_model("llama")
    second = AutoModelForCausalLM.from_config(first.config).eval()
    assert second.config is first.config
    seen = []
    handle = second.register_forward_pre_hook(lambda module, args: seen.append(module.config._attn_implementation))
    ids = prompts(rng, [6])[0][None]
    expected = second.generate(ids, max_new_tokens=4, do_sample=False)

    class Other(StoppingCriteria):
        """Runs the other model while the first one is decoded."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
            assert torch.equal(second.generate(ids, max_new_tokens=4, do_sample=False), expected)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    decoder = SpecExitDecoder(first, exit=ExitConfig.off())
    decoder.generate(ids, max_new_tokens=2, temperature=0.0, stopping_criteria=StoppingCriteriaList([Other()]))
    handle.remove()
    assert set(seen) == {first.config._attn_implementation}
    assert second.config is first.config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams must be 1, was 2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores must not be set"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits must not be set"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states must not be set"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens must not be set, was 3"),
        ({"seed": [1, 2]}, r"seed must be one int or one a prompt \(1\), was 2 of them"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": True, "min_p": 1.5}, "min_p"),
    ],
)
def test_refused_options(model: PreTrainedModel, options: dict[str, object], words: str) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor([[3, 4, 5]]), custom_generate=decoder, **{"max_new_tokens": 4, **options})


def test_embeddings_as_input_are_refused(model: PreTrainedModel) -> None:
    embeddings = model.get_input_embeddings()(torch.tensor([[3, 4, 5]]))
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with pytest.raises(ValueError, match="inputs_embeds must not be given"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2, custom_generate=decoder)


def test_decoder_of_another_model_is_refused(model: PreTrainedModel) -> None:
    decoder = SpecExitDecoder(tiny_model("llama", seed=1), exit=ExitConfig.off())
    with pytest.raises(ValueError, match="custom_generate must be a decoder made for this very model"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, custom_generate=decoder)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be finite and at least 0, was -0.5"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and at least 0, was nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite and at least 0, was inf"),
        ({"temperature": "0"}, TypeError, "temperature must be a number, was str"),
        ({"top_p": 3}, ValueError, "top_p must be between 0 and 1, was 3"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0, was 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int, was float"),
        ({"min_p": -1}, ValueError, "min_p must be between 0 and 1, was -1"),
        ({"max_new_tokens": 3.5}, TypeError, "max_new_tokens must be an int, was float"),
        ({"max_new_tokens": 2**31}, ValueError, r"max_new_tokens must be below 2\*\*31 - 1, was 2147483648"),
        ({"eos_token_id": 2**40}, ValueError, r"eos_token_id must be below 2\*\*31 - 1, was 1099511627776"),
        ({"eos_token_id": ["</s>"]}, TypeError, "eos_token_id must be an int, was str"),
    ],
)
def test_bad_options(model: PreTrainedModel, options: dict[str, Any], error: type[Exception], words: str) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with pytest.raises(error, match=words):
        decoder.generate(torch.tensor([[3, 4, 5]]), **{"max_new_tokens": 2, **options})


def test_ids_as_transformers_takes_them(model: PreTrainedModel) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    ids = torch.tensor([[3, 4, 5]])
    text = decoder.generate(ids, max_new_tokens=NEW, temperature=0).new_tokens[0]
    for end in (text[3], [text[3]], (text[3],), torch.tensor([text[3]])):
        out = decoder.generate(ids, max_new_tokens=NEW, temperature=0, eos_token_id=end)
        assert out.new_tokens[0] == text[: text.index(text[3]) + 1]
    assert decoder.generate(ids, max_new_tokens=NEW, temperature=0, eos_token_id=-1).new_tokens[0] == text
    decoder.generate(ids, max_new_tokens=2, temperature=2, seed=1)  # transformers itself takes no whole number


def test_autocast_is_refused(model: PreTrainedModel) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast must be off"):
        decoder.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"exit": 0.8}, TypeError, "exit must be an ExitConfig, or one for each prompt, was float"),
        ({"exit": [ExitConfig.off(), None]}, TypeError, "exit must be an ExitConfig, .*, was NoneType"),
        ({"tree": 60}, TypeError, "tree must be a TreeConfig, was int"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, was 0"),
        ({"capacity": "1k"}, TypeError, "capacity must be an int, was str"),
    ],
)
def test_bad_decoder(model: PreTrainedModel, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SpecExitDecoder(model, **options)


@pytest.mark.parametrize(
    "defaults",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
        {"max_new_tokens": 3},
        {"max_length": 15},
        {"suppress_tokens": list(range(3, VOCAB, 2))},
        {"temperature": 0.7, "top_p": 0.5},  # without do_sample they mean nothing
    ],
    ids=lambda value: next(iter(value)),
)
def test_defaults_of_the_model_are_honoured(
    model: PreTrainedModel, defaults: dict[str, object], rng: torch.Generator
) -> None:
    rows = prompts(rng, [7, 4])
    ids, mask = pad(rows, "left")
    decoder = decoder_for(model, rows)
    stops = [text[len(row) + 6] for row, text in zip(rows, texts(model, rows), strict=True)]
    model.generation_config.update(**{"max_length": ids.shape[1] + NEW, "eos_token_id": stops, **defaults})
    expected = model.generate(ids, attention_mask=mask)
    assert torch.equal(decoder.generate(ids, mask).sequences, expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, custom_generate=decoder), expected)
    for key, value in defaults.items():
        assert getattr(model.generation_config, key) == value


def test_sampling_by_the_models_defaults(model: PreTrainedModel, rng: torch.Generator) -> None:
    ids = prompts(rng, [7])[0][None]
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    settings = {"temperature": 0.6, "top_k": 9, "top_p": 0.8, "min_p": 0.05}
    explicit = decoder.generate(ids, max_new_tokens=NEW, seed=2, **settings)
    model.generation_config.update(do_sample=True, **settings)
    assert torch.equal(decoder.generate(ids, max_new_tokens=NEW, seed=2).sequences, explicit.sequences)
    greedy = decoder.generate(ids, max_new_tokens=NEW, temperature=0.0)
    assert greedy.sequences[0].tolist() == texts(model, [ids[0]])[0]


def test_training_mode_is_set_aside(rng: torch.Generator) -> None:
    """With dropout and gradient checkpointing on, the text is still that of the model in evaluation mode."""
    model = tiny_model("gpt2")
    rows = prompts(rng, [6])
    expected = texts(model, rows)[0]
    model.train()
    model.transformer.h[1].eval()  # a frozen part
    model.activation_checkpointing_enable() if hasattr(
        model, "activation_checkpointing_enable"
    ) else model.gradient_checkpointing_enable()
    before = footprint(model)
    decoder = SpecExitDecoder(model, OracleDraft([expected]), exit=ExitConfig.off(), tree=TREE)
    assert decoder.generate(rows[0][None], max_new_tokens=NEW, temperature=0.0).sequences[0].tolist() == expected
    assert footprint(model) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values must not be given: the base is driven by token ids"),
        ({"token_type_ids": torch.zeros(1, 3, dtype=torch.long)}, "token_type_ids must not be given"),
        ({"position_ids": torch.tensor([[4, 5, 6]])}, "position_ids must be left out"),
    ],
)
def test_inputs_besides_the_ids_are_refused(model: PreTrainedModel, given: dict[str, Any], words: str) -> None:
    """Whatever `generate` accepts for the model: decoding as if it were not there would be another text."""
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    call = {"generation_config": None, "logits_processor": None, "stopping_criteria": None, **given}
    with pytest.raises(ValueError, match=words):
        decoder(model, torch.tensor([[3, 4, 5]]), **{**call, "generation_config": model.generation_config})


def test_streaming_through_generate(model: PreTrainedModel) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    ids, streamer = torch.tensor([[3, 4, 5]]), Recorder()
    out = model.generate(ids, max_new_tokens=4, do_sample=False, custom_generate=decoder.streaming(streamer), seed=1)
    assert streamer.calls == [[3, 4, 5], *([token] for token in out[0, 3:].tolist()), "end"]
    with pytest.raises(TypeError, match="streamer must have put and end as transformers' have, was int"):
        decoder.generate(ids, max_new_tokens=4, streamer=3)


@pytest.mark.parametrize("new", [2**31 - 3, 2**31 - 2])
def test_no_limit_is_too_long(model: PreTrainedModel, new: int) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    text = decoder.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=NEW, temperature=0.0).new_tokens[0]
    out = decoder.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=new, temperature=0.0, eos_token_id=text[3])
    assert out.new_tokens[0] == text[: text.index(text[3]) + 1]
    ids = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2**40, custom_generate=decoder, eos_token_id=text[3])
    assert ids[0, 3:].tolist() == out.new_tokens[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tree", [TreeConfig.none(), TreeConfig.chain(3), TREE], ids=["plain", "chain", "tree"])
def test_the_default_dtype_does_not_matter(model: PreTrainedModel, dtype: torch.dtype, tree: TreeConfig) -> None:
    ids = torch.tensor([[3, 4, 5]])
    expected = texts(model, [ids[0]])[0]
    decoder = SpecExitDecoder(model, OracleDraft([expected]), exit=ExitConfig.off(), tree=tree)
    torch.set_default_dtype(dtype)
    try:
        out = decoder.generate(ids, max_new_tokens=NEW, temperature=0.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.sequences[0].tolist() == expected


def test_two_threads_take_turns(model: PreTrainedModel) -> None:
    decoder = SpecExitDecoder(model, exit=ExitConfig.off())
    prompts_ = [torch.tensor([[3, 4, 5 + index]]) for index in range(4)]
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    expected = [decoder.generate(ids, **options).new_tokens for ids in prompts_]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: decoder.generate(ids, **options).new_tokens, prompts_ * 3))
    assert found == expected * 3
