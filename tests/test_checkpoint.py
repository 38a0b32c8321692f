"""Reading and writing draft checkpoints: layouts, round trips, and what is said about files that do not fit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_reference import CONFIG, random_tensors, speculators, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specexit.bundled import bundled_pair
from specexit.config import TreeConfig
from specexit.drafts import Eagle3Config, Eagle3Draft, load_draft, save_draft, tensor_files

EMBEDDING = nn.Embedding(40, 16)
REDUCED = CONFIG | {"draft_vocab_size": 13}


def load(folder: Path, **options: Any) -> Eagle3Draft:
    return load_draft(folder, embedding=EMBEDDING, **options)


def fill(folder: Path, rng: torch.Generator, config: dict[str, Any] = CONFIG) -> tuple[Path, dict[str, Tensor]]:
    tensors = random_tensors(config, rng, torch.float32)
    return write_checkpoint(folder, config, tensors), tensors


def saved(draft: Eagle3Draft, folder: Path) -> dict[str, Tensor]:
    save_draft(draft, folder)
    return load_file(folder / "model.safetensors")


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bundled_draft_survives_a_round_trip(dtype, tmp_path):
    pair = bundled_pair()
    table = load_file(pair.base / "model.safetensors")["model.embed_tokens.weight"].to(dtype)
    draft = load_draft(pair.draft, embedding=nn.Embedding.from_pretrained(table))
    written = saved(draft, tmp_path)
    original = load_file(pair.draft / "model.safetensors")
    assert_same(written, {n: t.to(dtype) if t.is_floating_point() else t for n, t in original.items()})
    config = json.loads((pair.draft / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "config.json").read_text()) == config
    again = load_draft(tmp_path, embedding=nn.Embedding.from_pretrained(table))
    assert_same(dict(again.state_dict()), dict(draft.state_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_vocab_size": 13},
        {"attention_bias": True, "mlp_bias": True},
        {"early_stop_method": "progress"},
        {"early_stop_method": None, "exit_head": None},
        {"target_hidden_size": 24, "norm_before_residual": True, "target_layer_ids": [1, 2, 3]},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_round_trip_keeps_every_tensor_and_setting(changes, tmp_path, rng):
    folder, tensors = fill(tmp_path / "in", rng, CONFIG | changes)
    draft = load(folder)
    assert_same(saved(draft, tmp_path / "out"), tensors)
    assert_same(saved(load(tmp_path / "out"), tmp_path / "again"), tensors)
    first, second = draft.config, load(tmp_path / "out").config
    for key in Eagle3Config.__dataclass_fields__:
        if key != "extra":
            assert getattr(first, key) == getattr(second, key), key


def test_saved_tensors_do_not_share_the_drafts_memory(tmp_path, rng):
    """One file a tensor: a joined matrix must not be written once for each of its parts."""
    folder, tensors = fill(tmp_path / "in", rng)
    save_draft(load(folder), tmp_path / "out")
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size < (tmp_path / "out" / "model.safetensors").stat().st_size < size + 4096


def test_speculators_layout(tmp_path, rng):
    plain = REDUCED | {"early_stop_method": None, "exit_head": None}
    tensors = random_tensors(plain, rng, torch.float32)
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    extra = {
        "embed_tokens.weight": EMBEDDING.weight.detach().clone(),
        "verifier_norm.weight": torch.ones(16),
        "verifier_lm_head.weight": torch.ones(13, 16),
    }
    draft = load(write_checkpoint(tmp_path / "in", speculators(plain), renamed | extra))
    assert draft.config.norm_before_residual
    assert draft.feature_layers == (2, 9, 15)
    assert draft.config.draft_vocab_size == 13
    assert not draft.own_embedding
    assert_same(saved(draft, tmp_path / "out"), tensors)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLMEagle3"]
    assert "transformer_layer_config" not in written
    assert load(tmp_path / "out").config.norm_before_residual


def test_names_under_model(tmp_path, rng):
    tensors = random_tensors(CONFIG, rng, torch.float32)
    folder = write_checkpoint(tmp_path / "in", CONFIG, {f"model.{name}": tensor for name, tensor in tensors.items()})
    assert_same(saved(load(folder), tmp_path / "out") | {}, tensors)


def test_identical_vocabularies_need_no_map(tmp_path, rng):
    folder, tensors = fill(tmp_path, rng)
    assert "d2t" not in tensors
    assert load(folder).d2t is None


def test_exit_head_without_a_word_in_the_config(tmp_path, rng):
    tensors = random_tensors(CONFIG, rng, torch.float32)
    draft = load(write_checkpoint(tmp_path, {k: v for k, v in CONFIG.items() if k != "exit_head"}, tensors))
    assert (draft.source, len(draft.signals)) == ("output", 3)


def test_embedding_of_its_own(tmp_path, rng):
    """A draft that trained its embedding, or is narrower than its base, brings a table."""
    config = CONFIG | {"target_hidden_size": 32}
    tensors = random_tensors(config, rng, torch.float32)
    tensors["embed_tokens.weight"] = torch.randn(40, 16, generator=rng)
    base = nn.Embedding(40, 32)
    draft = load_draft(write_checkpoint(tmp_path / "in", config, tensors), embedding=base)
    assert draft.own_embedding
    assert torch.equal(draft.embedding.weight, tensors["embed_tokens.weight"])
    assert any(parameter is draft.embedding.weight for parameter in draft.parameters())
    assert_same(saved(draft, tmp_path / "out"), tensors)


def test_shards(tmp_path, rng):
    folder, tensors = fill(tmp_path, rng, REDUCED)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(saved(load(folder), tmp_path / "out"), tensors)

    index.write_text(json.dumps({"weight_map": weight_map | {"fc.bias": "model-00001-of-00003.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json names tensors that its files do not hold: fc\.bias"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"must name files beside it, names '\.\./model\.safetensors'"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "absent.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist"):
        load(folder)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(ValueError, match="must have a weight_map"):
        load(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        load(folder)


def test_pickle_only_when_asked_for(tmp_path, rng):
    folder, tensors = fill(tmp_path, rng)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle and was not opened; pass allow_pickle=True"):
        load(folder)
    assert_same(saved(load(folder, allow_pickle=True), tmp_path / "out"), tensors)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_pickle_with_code_is_refused_and_not_run(tmp_path, rng, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = fill(tmp_path / "draft", rng)
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read as tensors alone"):
        load(folder, allow_pickle=True)
    assert not (tmp_path / "payload-ran").exists()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold a dictionary of tensors"):
        load(folder, allow_pickle=True)


def test_missing_files(tmp_path, rng):
    folder, _ = fill(tmp_path / "draft", rng)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or model\.safetensors\.index\.json"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load(folder)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileNotFoundError, match="must be a folder"):
        load(file)


@pytest.mark.parametrize("cut", [0, 5, 200, -10])
def test_damaged_safetensors(cut, tmp_path, rng):
    folder, _ = fill(tmp_path, rng)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("fc.weight", (16, 48), r"fc\.weight must be \[19, 48\] \(hidden_size \+ 3 \(early_stop_method\), 3 x target"),
        ("fc.weight", (19, 32), r"fc\.weight must be \[19, 48\]"),
        (
            "midlayer.self_attn.k_proj.weight",
            (24, 32),
            r"k_proj\.weight must be \[12, 32\] \(num_attention_heads or num_key_value_heads x head_dim, 2 x hidden",
        ),
        (
            "midlayer.mlp.up_proj.weight",
            (25, 16),
            r"up_proj\.weight must be \[24, 16\] \(intermediate_size, hidden_size",
        ),
        ("midlayer.hidden_norm.weight", (17,), r"hidden_norm\.weight must be \[16\] \(hidden_size in config\.json\)"),
        ("lm_head.weight", (40, 16), r"lm_head\.weight must be \[13, 16\] \(draft_vocab_size, hidden_size"),
        ("exit_head.weight", (1, 16), r"exit_head\.weight must be \[3, 16\] \(exit_head: 3 signals, hidden_size"),
        ("d2t", (40,), r"d2t must be \[13\] \(draft_vocab_size in config\.json\), was \[40\]"),
        ("t2d", (13,), r"t2d must be \[40\] \(vocab_size in config\.json\), was \[13\]"),
        ("embed_tokens.weight", (40, 17), r"embed_tokens\.weight must be \[40, 16\] \(vocab_size, hidden_size"),
    ],
)
def test_shape_that_does_not_fit(name, shape, message, tmp_path, rng):
    tensors = random_tensors(REDUCED, rng, torch.float32)
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype if name in tensors else torch.float32)
    folder = write_checkpoint(tmp_path, REDUCED, tensors)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(list(shape)) in str(error.value)
    assert str(folder) in str(error.value)


def test_missing_and_unexpected_tensors_are_named(tmp_path, rng):
    tensors = random_tensors(CONFIG, rng, torch.float32)
    del tensors["norm.weight"], tensors["midlayer.self_attn.q_proj.weight"]
    tensors["midlayer.self_attn.q_norm.weight"] = torch.ones(6)
    folder = write_checkpoint(tmp_path, CONFIG, tensors)
    message = (
        r"missing: midlayer\.self_attn\.q_proj\.weight \[.*\), norm\.weight \[16\] \(hidden_size\); "
        r"unexpected: midlayer\.self_attn\.q_norm\.weight"
    )
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_bias_that_the_config_does_not_know(tmp_path, rng):
    folder = write_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG | {"attention_bias": True}, rng, torch.float32))
    with pytest.raises(ValueError, match=r"unexpected: midlayer\.self_attn\.k_proj\.bias"):
        load(folder)


def test_exit_head_that_is_only_promised(tmp_path, rng):
    tensors = random_tensors(CONFIG | {"exit_head": None}, rng, torch.float32)
    with pytest.raises(ValueError, match=r"missing: exit_head\.bias \[3\] \(exit_head: 3 signals\), exit_head\.weight"):
        load(write_checkpoint(tmp_path, CONFIG, tensors))


def test_two_tensors_of_one_name(tmp_path, rng):
    tensors = random_tensors(CONFIG, rng, torch.float32)
    tensors["layers.0.hidden_norm.weight"] = torch.ones(16)
    with pytest.raises(ValueError, match=r"two tensors stand for midlayer\.hidden_norm\.weight"):
        load(write_checkpoint(tmp_path, CONFIG, tensors))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("d2t", None, r"d2t is missing: a draft with draft_vocab_size 13 of vocab_size 40"),
        ("d2t", lambda t: t + 40, r"d2t must map to ids below vocab_size 40, maps to"),
        ("d2t", lambda t: t - 40, r"d2t must map to ids below vocab_size 40, maps to -"),
        ("d2t", lambda t: t.float(), r"d2t must hold integers, was torch\.float32"),
        ("t2d", lambda t: ~t, r"t2d must mark the ids that d2t maps to"),
        ("lm_head.weight", lambda t: t.long(), r"lm_head\.weight must be floating point, was torch\.int64"),
    ],
)
def test_tensor_with_impossible_content(name, change, message, tmp_path, rng):
    tensors = random_tensors(REDUCED, rng, torch.float32)
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value)
    with pytest.raises(ValueError, match=message):
        load(write_checkpoint(tmp_path, REDUCED, tensors))


def test_dtype_other_than_the_embeddings_is_refused(tmp_path, rng):
    folder, _ = fill(tmp_path, rng)
    with pytest.raises(ValueError, match=r"must be those of the base's embedding, were cpu and torch\.bfloat16"):
        load(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be those of the base's embedding, were meta"):
        load(folder, device="meta")


def test_hub_id_is_downloaded(tmp_path, rng, monkeypatch):
    folder, tensors = fill(tmp_path / "snapshot", rng)
    asked: list[Any] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(tensor_files, "snapshot_download", download)
    draft = load_draft("someone/draft", embedding=EMBEDDING, revision="v2")
    assert_same(saved(draft, tmp_path / "out"), tensors)
    assert asked[0][:2] == ("someone/draft", "v2")
    assert "pytorch_model.bin" not in asked[0][2]
    load_draft("someone/draft", embedding=EMBEDDING, allow_pickle=True)
    assert "pytorch_model.bin" in asked[1][2]


def test_hub_that_does_not_answer(monkeypatch):
    def download(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(tensor_files, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"there is no folder someone/draft, and the hub.*no network"):
        load_draft("someone/draft", embedding=EMBEDDING)


def test_path_that_can_be_no_hub_id():
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./no/such/folder"):
        load_draft("./no/such/folder", embedding=EMBEDDING)


def test_loaded_draft_is_ready(tmp_path, rng):
    folder, _ = fill(tmp_path, rng, REDUCED)
    draft = load(folder)
    assert not draft.training
    assert not any(parameter.requires_grad for parameter in draft.parameters())
    batch = draft.allocate(1, 8, TreeConfig.chain(2), "cpu", torch.float32)
    one = torch.ones(1, dtype=torch.int32)
    signals = batch.observe(torch.randn(1, 4, 48, generator=rng), torch.zeros(1, 4, dtype=torch.int32), one * 0, one)
    assert signals.shape == (1, 4, 3)
    assert batch.propose(one, one * 2).tokens.shape == (1, 2)
