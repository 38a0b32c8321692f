"""calibration.json beside a draft: what is read, refused, written and kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_traces import own_draft
from transformers import AutoModelForCausalLM

from specexit import ExitConfig, SpecExitDecoder, bundled_pair, load_draft, save_draft
from specexit.drafts.calibration import from_thresholds, read_calibration, write_calibration
from specexit.drafts.checkpoint import fingerprint_of, saved_fingerprint
from specexit.identity import fingerprint

EXIT = {"confidence": 0.4, "progress": None, "remaining": 12.5, "smoothing": "window", "window": 4, "source": "fc"}


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled_pair().base, dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return own_draft(tmp_path)


def content(base: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    rule = {"exit": EXIT, "kind": "certified", "temperature": 0.0, "max_loss": 0.01, "confidence_level": 0.95}
    rules = {"mine": {**rule, "evidence": {}}, "other": {"exit": {}, "kind": "estimated"}}
    marks = {"base": fingerprint(base), "draft": saved_fingerprint(folder)}
    return {"version": 1, "default": "mine", "rules": rules, **marks, **changes}


def load(folder: Path, base: Any, **options: Any) -> Any:
    return load_draft(folder, embedding=base.get_input_embeddings(), **options)


def test_it_is_read_and_used_by_default(folder: Path, base: Any) -> None:
    write_calibration(folder, content(base, folder))
    draft = load(folder, base)
    assert draft.calibration == content(base, folder)
    assert ExitConfig.from_draft(draft.calibration) == ExitConfig(**EXIT)
    assert ExitConfig.from_draft(draft.calibration, "other") == ExitConfig()
    decoder = SpecExitDecoder.from_pretrained(bundled_pair().base, folder, dtype=torch.float32, device="cpu")
    assert decoder.exit == ExitConfig(**EXIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_its_draft_is_known_in_any_precision(dtype: torch.dtype, folder: Path, base: Any) -> None:
    write_calibration(folder, content(base, folder))
    draft = load_draft(folder, embedding=base.get_input_embeddings().to(dtype), dtype=dtype)
    base.to(torch.float32)
    assert fingerprint_of(draft) == saved_fingerprint(folder)
    assert draft.calibration["default"] == "mine"


def test_older_thresholds_take_the_same_form(base: Any) -> None:
    calibration = load(bundled_pair().draft, base).calibration
    if "base" in calibration:
        pytest.skip("the bundled draft has a calibration.json")
    assert calibration["default"] == "no_loss"
    assert {rule["kind"] for rule in calibration["rules"].values()} == {"estimated"}


def test_thresholds_of_a_config() -> None:
    old = {"b": {"conf": 0.5, "remain": 3, "alpha": 0.2}, "a": {"prog": 0.1}}
    found = from_thresholds({"thresholds_from_calibration": old})
    assert found["default"] == "b"
    assert ExitConfig.from_draft(found) == ExitConfig(
        confidence=0.5, progress=None, remaining=3, alpha=0.2, source="output"
    )
    assert from_thresholds({"thresholds_from_calibration": {"a": {"conf": 1}, "no_loss": {"conf": 1}}})["default"] == (
        "no_loss"
    )
    assert from_thresholds({}) == {} == from_thresholds({"signals": []})
    with pytest.raises(ValueError, match="rule must be one of none: the draft has no rule, was None"):
        ExitConfig.from_draft({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version must be 1, was 2"),
        ({"rules": {}}, "rules must be an object with at least one rule"),
        ({"rules": 3}, "rules must be an object with at least one rule, was 3"),
        ({"default": "none"}, "default must be one of mine, other, was 'none'"),
        ({"draft": None}, "draft must be a fingerprint, was None"),
        ({"rules": {"mine": 3}}, "rules.mine must be an object with an exit, was 3"),
        ({"rules": {"mine": {"exit": {}, "kind": "good"}}}, "kind must be one of certified, estimated, was 'good'"),
        ({"rules": {"mine": {"exit": {"alpha": 2}, "kind": "certified"}}}, "rules.mine.exit: alpha must be between"),
        ({"rules": {"mine": {"exit": {"granularity": "step"}, "kind": "certified"}}}, "held granularity"),
    ],
)
def test_a_broken_file_is_named(changes: dict[str, Any], message: str, folder: Path, base: Any) -> None:
    file = folder / "calibration.json"
    file.write_text(json.dumps(content(base, folder, **changes)))
    with pytest.raises(ValueError, match=message) as error:
        load(folder, base)
    assert str(file) in str(error.value)
    with pytest.raises(ValueError, match=message):
        write_calibration(folder, content(base, folder, **changes))
    assert read_calibration(folder.parent) is None


def test_what_is_no_json_is_named(folder: Path, base: Any) -> None:
    (folder / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match=r"calibration.json is broken"):
        load(folder, base)


def test_other_weights_are_refused(folder: Path, base: Any, tmp_path: Path) -> None:
    write_calibration(folder, content(base, folder))
    draft = load(folder, base)
    save_draft(draft, tmp_path / "same")
    assert load(tmp_path / "same", base).calibration == draft.calibration
    # One number of one signal, far behind the values that a base is known by.
    draft.exit_weight[2, -1] += 0.5
    save_draft(draft, tmp_path / "same")  # the calibration that was there is of the weights that were
    assert not (tmp_path / "same" / "calibration.json").exists()
    shutil.copy(folder / "calibration.json", tmp_path / "same")
    with pytest.raises(ValueError, match="belongs to other weights of the draft: calibrate again"):
        load(tmp_path / "same", base)


def test_another_base_is_refused_unless_a_rule_is_given(folder: Path, base: Any) -> None:
    write_calibration(folder, {**content(base, folder), "base": "0" * 64})
    pair = bundled_pair()
    with pytest.raises(ValueError, match="was made with another base"):
        SpecExitDecoder.from_pretrained(pair.base, folder, dtype=torch.float32, device="cpu")
    decoder = SpecExitDecoder.from_pretrained(
        pair.base, folder, dtype=torch.float32, device="cpu", exit=ExitConfig.off()
    )
    assert decoder.exit == ExitConfig.off()
