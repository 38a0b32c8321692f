"""A run of training: what it leaves, that a kill costs nothing, that several processes are one, and bad input."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3_reference import random_tensors, speculators, write_checkpoint
from safetensors.torch import load_file
from test_files import largest_file
from tiny_models import VOCAB, tiny_model
from torch import Tensor
from training_cases import random_trace, write_traces
from transformers import PreTrainedModel

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, load_draft
from specexit.cli import main
from specexit.drafts import Eagle3Config
from specexit.files import locked
from specexit.training import checkpoint, objective
from specexit.training import fit as fit_module
from specexit.training.fit import FitResult, fit
from specexit.training.fit_config import FitConfig
from specexit.training.processes import Processes, find_processes

HIDDEN = 64
INIT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "draft_vocab_size": VOCAB,
}
FAST = {"steps": 3, "batch_size": 2, "depth": 2, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def traces(model: PreTrainedModel, tmp_path: Path, rng: torch.Generator) -> Path:
    return write_traces(tmp_path / "traces.jsonl", model, [random_trace(rng, name=str(i)) for i in range(9)])


def run(model: PreTrainedModel, traces: Path | list[Path], output: Path, **options: Any) -> FitResult:
    return fit(model, traces, output, FitConfig(**(FAST | options)))


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]


# --- what a run leaves


def test_a_draft_is_learned_and_decodes(model, tmp_path, rng):
    """The texts repeat a few tokens, as no random draft would."""
    cycle = torch.randint(3, VOCAB, (5,), generator=rng).tolist()
    first = random_trace(rng, prompt=5, thinking=20)
    text = {"prompt": cycle, "thinking": cycle * 4, "reply": cycle[:3]}
    texts = [replace(first, id=str(i), **text) for i in range(8)]
    path = write_traces(tmp_path / "t.jsonl", model, texts)
    seen: list[dict[str, Any]] = []
    options = FitConfig(steps=40, batch_size=4, depth=3, placement="both", held_out=0.2, checkpoint_every=15)
    result = fit(model, path, tmp_path / "draft", options, on_log=seen.append)
    assert seen == log_of(tmp_path / "draft")
    steps = [line for line in seen if "lr" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert [line["step"] for line in seen if "held_out" in line] == [15, 30, 40]
    assert max(steps[-1]["tokens"]) < steps[0]["tokens"][0]  # the base is unsure: most of it is its entropy
    for name in ("output", "fc"):
        assert sum(steps[-1][name].values()) < sum(steps[0][name].values())
    assert result.held_out == seen[-1]["held_out"]
    assert len(result.held_out["agreement"]) == len(result.held_out["token_loss"]) == 3
    assert result.held_out["agreement"][0] > 0.3  # by chance: 1 in 199
    assert not (tmp_path / "draft" / "checkpoints").exists()

    draft = load_draft(tmp_path / "draft", embedding=model.get_input_embeddings(), dtype=torch.float32)
    assert draft.config.feature_layers == (2, 3, 3)
    assert draft.config.early_stop_method == "confidence_progress_remain"
    training = draft.config.extra["training"]
    assert training["settings"]["steps"] == 40
    assert training["held_out"] == result.held_out
    again = Eagle3Config.from_dict(draft.config.to_dict())
    assert again.extra["training"] == training
    decoder = SpecExitDecoder(model, draft, tree=TreeConfig.chain(3), exit=ExitConfig.off())
    prompt = torch.tensor([cycle])
    out = decoder.generate(prompt, max_new_tokens=12)
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(out.sequences, plain)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "phi3", "mixtral", "llama3_rope", "gpt_neox"])
def test_a_draft_suits_its_base(name, tmp_path, rng):
    model = tiny_model(name)
    path = write_traces(tmp_path / "t.jsonl", model, [random_trace(rng, name=str(i)) for i in range(3)])
    run(model, path, tmp_path / "draft", steps=2, draft_vocab=50, save_dtype="float32")
    options = {"tree": TreeConfig.chain(2), "exit": ExitConfig.off()}
    decoder = SpecExitDecoder.from_pretrained(model, tmp_path / "draft", **options)
    config = decoder.draft.config
    assert config.hidden_size == model.config.get_text_config().hidden_size
    assert config.draft_vocab_size == len(decoder.draft.d2t) == 50
    if name == "llama3_rope":
        assert config.rope_parameters["rope_type"] == "llama3"
    prompt = torch.randint(3, VOCAB, (1, 9), generator=rng)
    out = decoder.generate(prompt, max_new_tokens=8)
    assert torch.equal(out.sequences, model.generate(prompt, max_new_tokens=8, do_sample=False))


def test_the_base_is_left_as_it_was(model, traces, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trains = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    run(model, traces, tmp_path / "draft")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == trains


def test_a_base_in_bfloat16_is_trained_in_float32(tmp_path, rng):
    model = tiny_model("llama").bfloat16()
    path = write_traces(tmp_path / "t.jsonl", model, [random_trace(rng, name=str(i)) for i in range(3)])
    run(model, path, tmp_path / "draft", save_dtype="float32")
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert any(not torch.equal(w.bfloat16().float(), w) for w in weights.values())
    run(model, path, tmp_path / "other")
    halves = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(halves[name], weights[name].bfloat16()) for name in weights)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_seeds_and_the_cache(model, traces, tmp_path):
    for name, options in {"a": {}, "b": {"cache_gib": 0.0}, "c": {"seed": 1}}.items():
        run(model, traces, tmp_path / name, **options)
    a, b, c = ((tmp_path / name / "training.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_several_files_are_one(model, tmp_path, rng):
    traces = [random_trace(rng, name=str(i)) for i in range(6)]
    whole = write_traces(tmp_path / "whole.jsonl", model, traces)
    parts = [write_traces(tmp_path / f"{n}.jsonl", model, part) for n, part in enumerate((traces[:4], traces[4:]))]
    for name, files in {"a": whole, "b": parts}.items():
        run(model, files, tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = write_traces(tmp_path / "other.jsonl", tiny_model("llama", seed=1), traces)
    with pytest.raises(ValueError, match=r"traces must be of one base, were of '.*' and '.*'"):
        run(model, [whole, other], tmp_path / "c")
    with pytest.raises(ValueError, match="traces must be one file or several, were none"):
        run(model, [], tmp_path / "c")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_unit_of_a_signal_loss_does_not_matter(optimizer, model, traces, tmp_path, monkeypatch):
    options = {"steps": 12, "optimizer": optimizer, "save_dtype": "float32"}
    run(model, traces, tmp_path / "plain", **options)
    original = objective.signal_losses
    for factor in (1024.0, 1000.0):
        scaled = torch.tensor([1.0, factor, 1.0])
        monkeypatch.setattr(objective, "signal_losses", lambda *x, by=scaled: original(*x) * by)
        run(model, traces, tmp_path / f"{factor}", **options)
    plain, exact, near = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "1024.0", "1000.0"))
    assert all(torch.equal(plain[name], exact[name]) for name in plain)  # a power of two rounds nothing
    if optimizer == "adamw":  # Muon's arithmetic is in bfloat16, and makes more of a last bit
        assert all(torch.allclose(plain[name], near[name], rtol=1e-3, atol=1e-4) for name in plain)
    weights = [log_of(tmp_path / name)[-2]["weights"] for name in ("plain", "1000.0")]
    assert weights[1][1] == pytest.approx(weights[0][1] / 1000, rel=1e-3)


# --- from an existing draft


def write_init(folder: Path, rng: torch.Generator, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    config = INIT | changes
    return write_checkpoint(folder, config, random_tensors(config, rng, dtype))


def is_signal(name: str) -> bool:
    return name.startswith("exit_head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("placement", ["output", "fc", "both"])
def test_signals_only_leaves_the_tokens_alone(placement, dtype, model, traces, tmp_path, rng):
    init = write_init(tmp_path / "init", rng, dtype, draft_vocab_size=30)
    result = run(model, traces, tmp_path / "new", init=init, signals_only=True, placement=placement, steps=6)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("init", "new"))
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype
        assert torch.equal(new[name][: len(tensor)], tensor), name
    assert ("exit_head.weight" in new) == (placement != "fc")
    assert len(new["fc.weight"]) == HIDDEN + (0 if placement == "output" else 3)
    lines = [line for line in log_of(tmp_path / "new") if "lr" in line]
    for name in ("output", "fc"):
        assert (name in lines[0]) == (placement in (name, "both")) == (name in result.held_out)
    assert "agreement" not in result.held_out
    assert "tokens" not in lines[0]


def test_an_old_head_that_is_not_trained_stays_too(model, traces, tmp_path, rng):
    tensors = random_tensors(INIT | {"exit_head": {}}, rng, torch.bfloat16)
    tensors["exit_head.weight"] = tensors["exit_head.weight"].float() * 1.00001  # needs all of float32
    tensors["exit_head.bias"] = tensors["exit_head.bias"].float()
    init = write_checkpoint(tmp_path / "init", INIT | {"exit_head": {}}, tensors)
    run(model, traces, tmp_path / "new", init=init, signals_only=True, placement="fc")
    new = load_file(tmp_path / "new" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(new[name][: len(tensor)], tensor.float()), name


def test_signals_only_learns(model, tmp_path, rng):
    path = write_traces(tmp_path / "t.jsonl", model, [random_trace(rng, name=str(i)) for i in range(4)])
    init = write_init(tmp_path / "init", rng)
    options = {"init": init, "signals_only": True, "placement": "both", "batch_size": 4, "lr": 1e-2, "held_out": 0.0}
    run(model, path, tmp_path / "new", steps=120, **options)
    steps = [line for line in log_of(tmp_path / "new") if "lr" in line]
    for name in ("output", "fc"):
        for signal_name, loss in steps[-1][name].items():
            assert loss < steps[0][name][signal_name], (name, signal_name)


def test_signals_that_are_there_are_gone_on_with(model, traces, tmp_path, rng):
    init = write_init(tmp_path / "init", rng, torch.float32, early_stop_method="progress", exit_head={"note": 1})
    run(model, traces, tmp_path / "new", init=init, placement="both", lr=0.0, save_dtype="float32")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("init", "new"))
    for name in old.keys() - {"fc.weight"}:
        assert torch.equal(new[name], old[name]), name
    assert torch.equal(new["fc.weight"][:HIDDEN], old["fc.weight"][:HIDDEN])
    assert torch.equal(new["fc.weight"][HIDDEN + 1], old["fc.weight"][HIDDEN])
    assert not new["fc.weight"][[HIDDEN, HIDDEN + 2]].any()


def test_thresholds_of_the_old_signals_are_dropped(model, traces, tmp_path, rng):
    head = {"thresholds_from_calibration": {"no_loss": {"conf": 0.5}}}
    init = write_init(tmp_path / "init", rng, exit_head=head)
    run(model, traces, tmp_path / "new", init=init)
    config = Eagle3Config.read(tmp_path / "new" / "config.json")
    assert "thresholds_from_calibration" not in config.exit_head


def test_fc_rows_stay_where_only_the_output_is_trained(model, traces, tmp_path, rng):
    init = write_init(tmp_path / "init", rng, torch.float32, early_stop_method="confidence_progress_remain")
    run(model, traces, tmp_path / "new", init=init, save_dtype="float32")
    old, new = (load_file(tmp_path / name / "model.safetensors")["fc.weight"] for name in ("init", "new"))
    assert torch.equal(new[HIDDEN:], old[HIDDEN:])
    assert not torch.equal(new[:HIDDEN], old[:HIDDEN])


def test_a_draft_of_speculators_is_read(model, traces, tmp_path, rng):
    flat = INIT | {"architectures": ["x"], "exit_head": None, "early_stop_method": None, "draft_vocab_size": 40}
    tensors = {k.replace("midlayer", "layers.0"): v for k, v in random_tensors(flat, rng, torch.float32).items()}
    config = speculators(flat, eagle_aux_hidden_state_layer_ids=[1, 2, 4])
    init = write_checkpoint(tmp_path / "init", config, tensors)
    run(model, traces, tmp_path / "new", init=init, signals_only=True)
    draft = load_draft(tmp_path / "new", embedding=model.get_input_embeddings())
    assert draft.config.norm_before_residual
    assert draft.config.feature_layers == (1, 2, 4)
    assert draft.config.draft_vocab_size == 40


# --- kills


KILLED = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads({threads})
from tiny_models import tiny_model
from specexit.training import checkpoint
from specexit.training.fit import fit
from specexit.training.fit_config import FitConfig

def kill(line):
    if line["step"] == {at}:
        os.kill(os.getpid(), signal.SIGKILL)

if {writing}:  # in the middle of a checkpoint
    save = torch.save
    def half(content, file):
        if content["step"] == {at}:
            file.write(b"PK half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)
    torch.save = half
    kill = None
fit(tiny_model("llama"), {traces!r}, {output!r}, FitConfig(**json.loads({config!r})), on_log=kill)
"""


def test_a_killed_run_ends_with_the_same_bits(model, traces, tmp_path):
    options = FAST | {"steps": 13, "checkpoint_every": 5, "placement": "both"}
    kills = {"step": {"at": 8, "writing": False}, "checkpoint": {"at": 10, "writing": True}}
    started = {}
    for name, kill in kills.items():
        code = KILLED.format(
            tests=str(Path(__file__).parent),
            threads=torch.get_num_threads(),
            traces=str(traces),
            output=str(tmp_path / name),
            config=json.dumps(options),
            **kill,
        )
        started[name] = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    run(model, traces, tmp_path / "whole", **options)
    for name, process in started.items():
        errors = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, errors
        assert not (tmp_path / name / "model.safetensors").exists()
        assert run(model, traces, tmp_path / name, **options).resumed_from == 5
        check_same_files(tmp_path / name, tmp_path / "whole")


def check_same_files(folder: Path, whole: Path) -> None:
    names = ["config.json", "model.safetensors", "training.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert len({(folder / name).stat().st_mode for name in names}) == 1
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


class Stopped(Exception):
    pass


def stop_at(step: int):
    def told(line):
        if line["step"] == step:
            raise Stopped

    return told


def stopped_run(model, traces, output, step, **options):
    with pytest.raises(Stopped):
        fit(model, traces, output, FitConfig(**(FAST | options)), on_log=stop_at(step))


@pytest.mark.parametrize(
    ("at", "from_step"),
    [("before the first", 0), ("before the draft", 6), ("half of the draft", 6), ("before they are removed", 6)],
)
def test_a_run_goes_on_from_its_last_checkpoint(at, from_step, model, traces, tmp_path, monkeypatch):
    def stop(*arguments):
        raise Stopped

    options, stopped = {"steps": 6, "checkpoint_every": 3}, tmp_path / "stopped"
    run(model, traces, tmp_path / "whole", **options)
    if at == "before the first":
        stopped_run(model, traces, stopped, 2, **options)
    else:
        removing = at == "before they are removed"
        with monkeypatch.context() as patch:
            patch.setattr(*((checkpoint, "remove_checkpoints") if removing else (fit_module, "write_draft")), stop)
            with pytest.raises(Stopped):
                run(model, traces, stopped, **options)
        if at == "half of the draft":
            (stopped / "model.safetensors").write_bytes(b"")
    assert run(model, traces, stopped, **options).resumed_from == from_step
    check_same_files(stopped, tmp_path / "whole")


def test_two_runs_do_not_write_to_one_folder(model, traces, tmp_path):
    options = {"steps": 4, "checkpoint_every": 1}
    run(model, traces, tmp_path / "whole", **options)

    def start_another(line):
        if line["step"] == 2:
            with pytest.raises(ValueError, match="is being written by another process"):
                run(model, traces, tmp_path / "d", **options)

    fit(model, traces, tmp_path / "d", FitConfig(**(FAST | options)), on_log=start_another)
    check_same_files(tmp_path / "d", tmp_path / "whole")


def test_the_last_checkpoints_are_kept(model, traces, tmp_path):
    stopped_run(model, traces, tmp_path / "d", 8, steps=9, checkpoint_every=2, keep=2)
    names = sorted(path.name for path in (tmp_path / "d" / "checkpoints").iterdir())
    assert names == ["step-00000004.pt", "step-00000006.pt"]


def test_another_run_is_refused_by_name(model, traces, tmp_path, rng):
    output = tmp_path / "d"
    stopped_run(model, traces, output, 3, steps=6, checkpoint_every=2)
    with pytest.raises(ValueError, match="was made with another depth: 2, now 3"):
        run(model, traces, output, steps=6, depth=3)
    with pytest.raises(ValueError, match="was made with another steps: 6, now 7"):
        run(model, traces, output, steps=7)
    other = write_traces(tmp_path / "o.jsonl", model, [random_trace(rng, name=str(i)) for i in range(9)])
    with pytest.raises(ValueError, match=r"was made with another (traces|draft's first weights)"):
        run(model, other, output, steps=6)
    assert run(model, traces, output, steps=6, checkpoint_every=1, keep=9).resumed_from == 2


def test_the_setting_is_named_not_what_follows_from_it(model, traces, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "write_draft", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, traces, tmp_path / "draft")
    with pytest.raises(ValueError, match="was made with another seed: 0, now 1"):
        run(model, traces, tmp_path / "draft", seed=1)
    with pytest.raises(ValueError, match="was made with another dtype of the base: 'float32', now 'bfloat16'"):
        run(tiny_model("llama").bfloat16(), traces, tmp_path / "draft")


def test_one_run_at_a_time_has_the_folder(model, traces, tmp_path):
    (tmp_path / "draft").mkdir()
    with locked(tmp_path / "draft"), pytest.raises(ValueError, match="is being written by another process"):
        run(model, traces, tmp_path / "draft")
    assert not list((tmp_path / "draft").iterdir())
    run(model, traces, tmp_path / "draft")


@pytest.mark.parametrize("size", [300, 20_000])  # of the log, of a checkpoint
def test_a_full_disk_is_named_and_costs_nothing(size, model, traces, tmp_path, capsys):
    model.save_pretrained(tmp_path / "base")
    command = ["train", "fit", "--model", str(tmp_path / "base"), "--traces", str(traces), "--device", "cpu"]
    command += ["--steps", "4", "--batch-size", "2", "--depth", "2", "--checkpoint-every", "2", "--output"]
    with largest_file(size):
        assert main([*command, str(tmp_path / "draft")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and str(tmp_path / "draft") in told, told  # noqa: PT018
    assert main([*command, str(tmp_path / "draft")]) == 0
    assert main([*command, str(tmp_path / "other")]) == 0
    found = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("draft", "other")]
    assert found[0] == found[1]


def test_a_finished_run_is_not_repeated(model, traces, tmp_path):
    first = run(model, traces, tmp_path / "d")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    again = run(model, traces, tmp_path / "d")
    assert again.resumed_from == FAST["steps"]
    assert again.held_out == first.held_out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()} == times
    with pytest.raises(ValueError, match="made with another seed: 0, now 4"):
        run(model, traces, tmp_path / "d", seed=4)


def test_what_is_in_the_folder_is_not_overwritten(model, traces, tmp_path, rng):
    init = write_init(tmp_path / "other", rng)
    with pytest.raises(ValueError, match=r"output must be a new folder, .* holds another model"):
        run(model, traces, init)
    (init / "config.json").unlink()
    with pytest.raises(ValueError, match=r"output must be a new folder, .* holds a model"):
        run(model, traces, init)
    with pytest.raises(ValueError, match=r"output must be a folder, .* is a file"):
        run(model, traces, traces)


def test_a_damaged_checkpoint_is_named(model, traces, tmp_path):
    stopped_run(model, traces, tmp_path / "d", 3, steps=6, checkpoint_every=2)
    path = next((tmp_path / "d" / "checkpoints").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-00000002.pt is not a checkpoint of training"):
        run(model, traces, tmp_path / "d", steps=6)


# --- several processes

SEVERAL = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from tiny_models import tiny_model
from specexit.training.fit import fit
from specexit.training.fit_config import FitConfig
fit(tiny_model("llama").double(), {traces!r}, {output!r}, FitConfig(**json.loads({config!r})))
"""


def test_two_processes_are_one_with_twice_the_batch(traces, tmp_path, rng):
    pytest.importorskip("accelerate")
    model = tiny_model("llama").double()
    options = FAST | {"steps": 4, "optimizer": "adamw", "save_dtype": "float32", "placement": "both", "held_out": 0.3}
    one = run(model, traces, tmp_path / "one", **(options | {"batch_size": 4}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = SEVERAL.format(
        tests=str(Path(__file__).parent), traces=str(traces), output=str(tmp_path / "two"), config=json.dumps(options)
    )
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    first = load_file_of_nothing_trained(model, traces, tmp_path)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, first[name]), name
    held_out = json.loads((tmp_path / "two" / "config.json").read_text())["training"]["held_out"]
    assert held_out["agreement"] == pytest.approx(one.held_out["agreement"])
    assert held_out["output"] == pytest.approx(one.held_out["output"], rel=1e-4)
    logs = [log_of(tmp_path / name) for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    assert logs[1][3]["tokens"] == pytest.approx(logs[0][3]["tokens"])


def load_file_of_nothing_trained(model: PreTrainedModel, traces: Path, folder: Path) -> dict[str, Tensor]:
    run(model, traces, folder / "zero", steps=1, lr=0.0, placement="both", save_dtype="float32")
    return load_file(folder / "zero" / "model.safetensors")


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="several processes need accelerate"):
        find_processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert find_processes() == Processes()


# --- bad input


def test_traces_of_another_base_are_refused(traces, tmp_path):
    with pytest.raises(ValueError, match=r"traces.jsonl is of another base"):
        run(tiny_model("llama", seed=1), traces, tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 50, "draft_vocab_size": 50}, "made for another vocabulary: vocab_size is 50"),
        ({"hidden_size": 32}, "draft's hidden_size 32"),
        ({"target_hidden_size": 48}, "init must be a draft for a base of hidden size 64, .* is for 48"),
        ({"target_layer_ids": [1, 2, 77]}, "feature_layers must be layers of the base"),
    ],
)
def test_a_draft_of_another_base_is_refused(changes, message, model, traces, tmp_path, rng):
    init = write_init(tmp_path / "init", rng, **changes)
    with pytest.raises(ValueError, match=message):
        run(model, traces, tmp_path / "d", init=init)


def test_an_exit_head_is_not_left_behind(model, traces, tmp_path, rng):
    init = write_init(tmp_path / "init", rng, exit_head={})
    with pytest.raises(ValueError, match="placement must be 'output' or 'both', was 'fc'"):
        run(model, traces, tmp_path / "d", init=init, placement="fc")
    run(model, traces, tmp_path / "d", init=init, placement="fc", signals_only=True)  # the layer stays


def test_a_draft_vocabulary_of_the_wrong_size_is_refused(model, traces, tmp_path):
    with pytest.raises(ValueError, match=f"draft_vocab must be from 1 to the base's vocabulary of {VOCAB}, was 200"):
        run(model, traces, tmp_path / "d", draft_vocab=200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, was 0"),
        ({"optimizer": "sgd"}, "optimizer must be one of muon, adamw, was 'sgd'"),
        ({"placement": "here"}, "placement must be one of output, fc, both"),
        ({"save_dtype": "int8"}, "save_dtype must be one of"),
        ({"held_out": 1.5}, "held_out must be between 0 and 1"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"signals_only": True}, "signals_only must come with init"),
        ({"init": "x", "draft_vocab": 5}, "draft_vocab must be None with init"),
        ({"max_length": 2}, "max_length must be at least 3"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**changes)


def test_a_loss_that_is_no_number_stops_the_run(model, traces, tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "token_loss", lambda *arguments: (arguments[0] * float("nan")).sum())
    with pytest.raises(FloatingPointError, match="a loss was no number at step 1: lr must be lower"):
        run(model, traces, tmp_path / "d")
    assert not (tmp_path / "d" / "model.safetensors").exists()


# --- the command


def test_the_command_trains_and_tells(model, traces, tmp_path, capsys):
    model.save_pretrained(tmp_path / "base")
    arguments = ["train", "fit", "--model", str(tmp_path / "base"), "--traces", str(traces), "--output"]
    fast = ["--steps", "2", "--batch-size", "2", "--depth", "2", "--held-out", "0.2", "--draft-vocab", "60"]
    assert main([*arguments, str(tmp_path / "draft"), *fast]) == 0
    told = capsys.readouterr()
    assert "7 to train on, 2 held out" in " ".join(told.err.split())
    assert "of the generated tokens are in the draft's vocabulary" in " ".join(told.err.split())
    assert "next token as the base's, by depth" in told.out
    assert "losses of the exit head" in told.out
    load_draft(tmp_path / "draft", embedding=model.get_input_embeddings())
    assert main([*arguments, str(tmp_path / "draft"), *fast]) == 0
    assert "2, all done before" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "draft"), *fast, "--seed", "1"]) == 2
    assert "made with another seed: 0, now 1" in " ".join(capsys.readouterr().err.split())
    assert main([*arguments, str(tmp_path / "x"), *fast, "--max-length", "3"]) == 2


def test_held_out_texts_may_be_cut_before_their_thinking(model, tmp_path, rng, capsys):
    model.save_pretrained(tmp_path / "base")
    every = [random_trace(rng, name=str(i)) for i in range(4)]
    longest = max(len(trace.prompt) for trace in every)
    every = [replace(trace, prompt=[3] * longest) for trace in every]
    traces = write_traces(tmp_path / "traces.jsonl", model, every)
    command = ["train", "fit", "--model", str(tmp_path / "base"), "--traces", str(traces), "--steps", "1"]
    command += ["--depth", "2", "--batch-size", "2", "--max-length", str(longest + 2), "--device", "cpu"]
    for extra in ([], ["--placement", "both"]):
        assert main([*command, *extra, "--output", str(tmp_path / f"draft{len(extra)}")]) == 0
        assert "confidence" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--traces", "none.jsonl"], "--traces: there is no file none.jsonl"),
        (["--output", __file__], "--output must be a folder"),
        (["--signals-only"], "--signals-only must come with --init"),
        (["--steps", "0"], "--steps"),
        (["--device", "gpu"], "--device must be cpu, cuda"),
        (["--placement", "both", "--init", "x", "--draft-vocab", "9"], "draft_vocab must be None with init"),
    ],
)
def test_the_command_refuses_at_once(arguments, message, capsys):
    given = {"--model": "no/such/base", "--traces": __file__, "--output": "no-such-folder"}
    rest = [text for pair in given.items() if pair[0] not in arguments for text in pair]
    assert main(["train", "fit", *rest, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
