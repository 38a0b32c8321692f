"""Which models and drafts the decoder takes, and why it refuses the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from oracle_draft import OracleDraft
from tiny_models import VOCAB, tiny_model
from tolerances import assert_close
from transformers import PreTrainedModel

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair
from specexit.attention import chain_context
from specexit.base import BaseModel, check_supported

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(name: str, head: str = "ForCausalLM", **options: object) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    torch.manual_seed(0)
    return getattr(transformers, name.removesuffix("Text") + head)(config).eval()


def t5() -> PreTrainedModel:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16)
    return transformers.T5ForConditionalGeneration(config)


def mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config)


def bloom() -> PreTrainedModel:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    )


def bert() -> PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    config.is_decoder = True
    return transformers.BertLMHeadModel(config)


def llama4() -> PreTrainedModel:
    return small("Llama4Text", head_dim=16, num_local_experts=2, intermediate_size_mlp=48)


def dynamic_ntk() -> PreTrainedModel:
    return small("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


def spread() -> PreTrainedModel:
    model = small("Llama")
    model.lm_head.to("meta")
    return model


REFUSED = {
    "encoder-decoder": (t5, "T5ForConditionalGeneration is not supported: it is an encoder-decoder"),
    "state": (mamba, "MambaForCausalLM is not supported: it keeps a recurrent state"),
    "attention": (bloom, "BloomForCausalLM is not supported: transformers gives it no pluggable attention"),
    "chunked": (llama4, "Llama4ForCausalLM is not supported: it has layers of type chunked_attention"),
    "rope": (dynamic_ntk, r"LlamaForCausalLM is not supported: .* \(dynamic NTK\)"),
    "head": (lambda: small("Llama", "Model"), "LlamaModel is not supported: it has no language-model head"),
    "devices": (spread, "LlamaForCausalLM is not supported: its layers are on several devices"),
    "layers": (bert, "BertLMHeadModel cannot be driven: its decoder has no list of layers"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name_and_reason(make: object, words: str) -> None:
    model = make()
    for draft in (None, OracleDraft([[3]])):  # the model is looked at first, whatever the draft asks for
        with pytest.raises(ValueError, match=words):
            SpecExitDecoder(model, draft, exit=ExitConfig.off())


@pytest.mark.parametrize(
    "thing", [torch.nn.Linear(2, 2), None, "llama", tiny_model], ids=["module", "None", "str", "function"]
)
def test_not_a_model(thing: object) -> None:
    with pytest.raises(TypeError, match="base must be a transformers model, was "):
        check_supported(thing)
    with pytest.raises(TypeError, match="base must be a transformers model, was "):
        SpecExitDecoder(thing, OracleDraft([[3]]))


def test_shared_keys_are_compacted_once() -> None:
    """The last layers of Gemma 3n attend to the keys of earlier ones and keep none."""
    model = small(
        "Gemma3nText",
        head="ForCausalLM",
        head_dim=16,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    ids = torch.arange(3, 15)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    decoder = SpecExitDecoder(model, exit=ExitConfig.off(), tree=TreeConfig(nodes=6, depth=3, top_k=2))
    assert torch.equal(model.generate(ids, custom_generate=decoder, **options), model.generate(ids, **options))


def test_probe_refuses_a_model_that_ignores_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        attend = layer.self_attn.forward

        def forget(*args: object, attend: object = attend, attention_mask: object = None, **kwargs: object) -> object:
            kwargs.pop("specexit", None)  # plain causal attention over whatever the cache returns
            return attend(*args, attention_mask=None, **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", forget)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is not supported: over a token tree its logits differ"):
        SpecExitDecoder(model, exit=ExitConfig.off())


def test_probe_refuses_a_model_that_drops_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of transformers' layers pass no keyword on to their attention."""
    model = tiny_model("llama")
    attention = model.model.layers[3].self_attn
    attend = attention.forward

    def forward(*args: object, specexit: object = None, **kwargs: object) -> object:
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is not supported: it fails over a token tree: .*mask"):
        SpecExitDecoder(model, exit=ExitConfig.off())
    assert model.config._attn_implementation != "specexit"


def test_probe_refuses_a_model_that_ignores_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb.forward

    def counted(x: torch.Tensor, position_ids: torch.Tensor) -> object:
        return rotary(x, position_ids[:, :1] + torch.arange(position_ids.shape[1]))

    monkeypatch.setattr(model.model.rotary_emb, "forward", counted)
    with pytest.raises(ValueError, match="over a token tree its logits differ"):
        SpecExitDecoder(model, exit=ExitConfig.off())


@pytest.mark.parametrize("layers", [(2, 3, 6), (-1, 0, 1)])
def test_feature_layers_out_of_range(layers: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    words = r"feature_layers must be layers of the base \(0 to 5\), was \(" + str(layers[0])
    with pytest.raises(ValueError, match=words):
        BaseModel(model, layers)
    draft = OracleDraft([[3]])
    draft.feature_layers = layers
    with pytest.raises(ValueError, match=words):
        SpecExitDecoder(model, draft, exit=ExitConfig.off())


def test_feature_layers_by_default() -> None:
    model = tiny_model("llama")
    assert BaseModel(model).feature_layers == ()
    assert BaseModel(model, None).feature_layers == (2, 3, 3)
    assert BaseModel(model, None).feature_size == 3 * 64
    with pytest.raises(ValueError, match=r"feature_layers must be layers of the base \(0 to 1\), was \(2, 1, -1\)"):
        BaseModel(small("Llama", num_hidden_layers=2), None)  # too shallow for EAGLE-3's choice


def test_features_are_in_the_order_of_their_layers(rng: torch.Generator) -> None:
    model = tiny_model("llama")
    tokens = torch.randint(3, VOCAB, (1, 5), generator=rng)
    inputs = model(tokens, output_hidden_states=True).hidden_states  # the input of each layer
    base = BaseModel(model, (4, 1, 4))
    lengths = torch.zeros(1, dtype=torch.int32)
    with torch.no_grad(), base.attached():
        _, features = base.forward(tokens, chain_context(lengths, 5), base.new_cache(lengths, 8))
    assert_close(features, torch.cat([inputs[index] for index in (4, 1, 4)], -1).detach(), torch.float32)


def test_loaded_base_stays_as_it_is() -> None:
    for option in ({"dtype": torch.bfloat16}, {"device": "cpu"}):
        with pytest.raises(ValueError, match="dtype and device must be None for a base that is loaded"):
            SpecExitDecoder.from_pretrained(tiny_model("llama"), **option)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"exit": "release"}, "exit must be an ExitConfig, or one for each prompt, was str"),
        ({"tree": 60}, "tree must be a TreeConfig, was int"),
        ({"seed": 1.5}, "seed must be an int or one a prompt, was float"),
        ({"seed": "1"}, "seed must be an int or one a prompt, was str"),
    ],
)
def test_options_of_a_wrong_type(option: dict[str, object], words: str) -> None:
    decoder = SpecExitDecoder(tiny_model("llama"), exit=ExitConfig.off())
    with pytest.raises(TypeError, match=words):
        decoder.generate(torch.tensor([[3, 4]]), max_new_tokens=2, **option)


def test_draft_of_another_base() -> None:
    with pytest.raises(ValueError, match=r"draft must read features of 192 numbers, .* was made for 96"):
        SpecExitDecoder(tiny_model("llama"), OracleDraft([[3]], hidden=32), exit=ExitConfig.off())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "row 0 was empty"),
        (torch.tensor([[3, VOCAB]]), rf"in \[0, {VOCAB}\), the base's vocabulary, was {VOCAB} at \[0, 1\]"),
        (torch.tensor([[-1, 3]]), r"was -1 at \[0, 0\]"),
        (torch.tensor([3, 4]), r"input_ids must be \[B, P\], was \[2\]"),
    ],
)
def test_bad_prompts(ids: torch.Tensor, words: str) -> None:
    decoder = SpecExitDecoder(tiny_model("llama"), exit=ExitConfig.off())
    with pytest.raises(ValueError, match=words):
        decoder.generate(ids, max_new_tokens=2)


@pytest.fixture(scope="module")
def longrope() -> PreTrainedModel:
    """A Phi-3 that was trained on 32 positions and stretches to 256."""
    return small(
        "Phi3",
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        },
    )


def test_longrope_below_the_switch(longrope: PreTrainedModel) -> None:
    ids = torch.randint(3, VOCAB, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = longrope.generate(ids, **options)
    texts = [row[keep:].tolist() for row, keep in zip(expected, (0, 7), strict=True)]
    draft = OracleDraft(texts, hidden=32)
    draft.feature_layers = (1, 2, 3)
    decoder = SpecExitDecoder(longrope, draft, exit=ExitConfig.off(), tree=TreeConfig(nodes=24, depth=7, top_k=3))
    assert torch.equal(longrope.generate(ids, custom_generate=decoder, **options), expected)


@pytest.mark.parametrize(("prompt", "new"), [(20, 13), (40, 4)], ids=["across", "beyond"])
def test_longrope_past_the_switch_is_refused(longrope: PreTrainedModel, prompt: int, new: int) -> None:
    """Its logits depend on how far the whole batch reaches, and prompts are read in chunks: nothing to be exact to."""
    decoder = SpecExitDecoder(longrope, exit=ExitConfig.off())
    words = rf"must stay within 32 positions, was {prompt + new}: past them .*longrope"
    with pytest.raises(ValueError, match=words):
        decoder.generate(torch.full((1, prompt), 5), max_new_tokens=new)


def test_other_rotary_embeddings_have_no_switch() -> None:
    assert BaseModel(tiny_model("llama3_rope")).max_positions is None
    assert BaseModel(tiny_model("gemma3")).max_positions is None
    assert BaseModel(tiny_model("gpt2")).max_positions is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Phimoe", {"num_local_experts": 2}),
        ("Qwen2Moe", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4, "num_experts": 4}),
    ],
)
def test_a_window_that_only_the_mask_knows_is_refused(name: str, options: dict[str, object]) -> None:
    """The probe's text is shorter than the window, so that only what the attention is called with tells."""
    words = "the sliding window of 16 is not given to the attention of layer 0"
    with pytest.raises(ValueError, match=words):
        SpecExitDecoder(small(name, sliding_window=16, **options), exit=ExitConfig.off())
    SpecExitDecoder(small(name, sliding_window=64, max_position_embeddings=64, **options), exit=ExitConfig.off())


def test_modules_without_a_tokenizer_are_told_that_nothing_exits() -> None:
    pair = bundled_pair()
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    with pytest.warns(UserWarning, match="without a tokenizer .* the exit is off"):
        decoder = SpecExitDecoder.from_pretrained(model, pair.draft)
    assert decoder.exit == ExitConfig.off()


def test_bases_that_cannot_be_loaded(tmp_path: Path) -> None:
    pair = bundled_pair()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(Path(pair.base) / name, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: .*header"):
        SpecExitDecoder.from_pretrained(tmp_path)
    weights.unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"read with allow_pickle=True"):
        SpecExitDecoder.from_pretrained(tmp_path)
    decoder = SpecExitDecoder.from_pretrained(tmp_path, allow_pickle=True)  # and no tokenizer: ids will do
    assert decoder.tokenizer is None
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(
        decoder.generate(ids, max_new_tokens=5, temperature=0.0).sequences,
        model.generate(ids, max_new_tokens=5, do_sample=False),
    )
    with pytest.raises(TypeError, match="base must be a transformers model, was OptimizedModule"):
        SpecExitDecoder.from_pretrained(torch.compile(model))
    with pytest.raises(TypeError, match="draft must be a path, a hub id or a Draft, was int"):
        SpecExitDecoder.from_pretrained(model, 5)
