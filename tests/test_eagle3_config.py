"""The config.json of a draft in its published forms, and what is said of one that cannot be used."""

import json
from pathlib import Path

import pytest
from eagle3_reference import CONFIG, speculators

from specexit.drafts import Eagle3Config


def write(folder: Path, content: str) -> Path:
    (folder / "config.json").write_text(content)
    return folder / "config.json"


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({}, None),
        ({"target_layer_ids": [2, 4, 5]}, (2, 4, 5)),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}, (2, 4, 5)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}}, (2, 4, 5)),
        ({"eagle_config": {"use_aux_hidden_state": True}}, None),
        ({"eagle_config": None}, None),
    ],
)
def test_feature_layers_are_layer_inputs(keys, layers):
    assert Eagle3Config.from_dict(CONFIG | keys).feature_layers == layers


def test_rope_parameters_in_all_spellings():
    old = Eagle3Config.from_dict(CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    new = Eagle3Config.from_dict(
        {k: v for k, v in CONFIG.items() if k != "rope_theta"}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}
    )
    for key in ("rope_type", "rope_theta", "factor"):
        assert old.rope_parameters[key] == new.rope_parameters[key]
    assert new.to_dict()["rope_theta"] == 100.0
    assert new.to_dict()["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert "rope_parameters" not in new.to_dict()


def test_reading_does_not_change_what_was_passed():
    content = CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    before = json.dumps(content)
    Eagle3Config.from_dict(content)
    assert json.dumps(content) == before


def test_defaults_that_configs_leave_out():
    missing = ("num_key_value_heads", "head_dim", "draft_vocab_size", "rope_theta")
    config = Eagle3Config.from_dict({key: value for key, value in CONFIG.items() if key not in missing})
    assert (config.num_key_value_heads, config.head_dim, config.draft_vocab_size) == (4, 4, 40)
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"intermediate_size": "24"}, "intermediate_size must be a positive integer, was '24'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, was 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, were 4 and 3"),
        ({"head_dim": 5}, "head_dim must be even, was 5"),
        ({"draft_vocab_size": 41}, "draft_vocab_size 41 exceeds vocab_size 40"),
        ({"num_hidden_layers": 8}, "num_hidden_layers must be 1 in an EAGLE-3 draft, was 8"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' in an EAGLE-3 draft, was 'gelu'"),
        ({"norm_before_fc": True}, "norm_before_fc must be False in an EAGLE-3 draft, was True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, was 0"),
        ({"early_stop_method": "mood"}, "early_stop_method must be one of"),
        ({"early_stop_method": []}, "early_stop_method must be one of"),
        ({"exit_head": True}, "exit_head must be an object, was True"),
        ({"target_layer_ids": [1, 2]}, r"three feature layers are needed, were \[1, 2\]"),
        ({"target_layer_ids": "all"}, "target_layer_ids must be a list of layer numbers, was 'all'"),
        ({"target_layer_ids": [1, 2, -1]}, "target_layer_ids must be a list of layer numbers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' follows the length"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope type 'spiral' is not one of"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope parameters .* cannot be used"),
        ({"rope_scaling": 2.0}, "rope_scaling must be an object, was 2.0"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number, was 'big'"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, was 0"),
        ({"exit_head": {"thresholds_from_calibration": 7}}, "thresholds_from_calibration must be an object of objects"),
    ],
)
def test_config_that_cannot_be_is_refused_by_key(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        Eagle3Config.read(write(tmp_path, json.dumps(CONFIG | changes)))
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculators_model_type": "mlp"}, "speculators_model_type must be 'eagle3', was 'mlp'"),
        ({"transformer_layer_config": None}, "transformer_layer_config must be an object, was None"),
        ({"norm_before_fc": True}, "norm_before_fc must be False"),
    ],
)
def test_speculators_config_that_is_no_eagle3(changes, message):
    with pytest.raises(ValueError, match=message):
        Eagle3Config.from_dict(speculators(CONFIG, **changes))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object, was list")]
)
def test_config_that_is_no_json_object(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Eagle3Config.read(write(tmp_path, content))
