import stat

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from specexit import bundled
from specexit.bundled import bundled_pair, load_problems
from specexit.drafts import load_draft

SPLITS = ("test", "calibration")


def test_pair_is_complete_and_readable():
    pair = bundled_pair()
    assert (pair.base / "model.safetensors").is_file()
    assert (pair.draft / "model.safetensors").is_file()
    for file in (*pair.base.iterdir(), *pair.draft.iterdir(), pair.test, pair.calibration):
        assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444, file


@pytest.mark.parametrize("split", SPLITS)
def test_problems_have_questions_and_answers(split):
    problems = load_problems(split)
    assert len(problems) == 300
    assert len({problem.id for problem in problems}) == 300
    assert all(problem.question.endswith("?") and len(problem.answer) == 2 for problem in problems)


def test_splits_share_no_problem():
    test, calibration = ({problem.question for problem in load_problems(split)} for split in SPLITS)
    assert not test & calibration


def test_answers_follow_from_the_questions():
    for problem in load_problems("test"):
        *steps, asked = problem.question.removesuffix(" ?").split(" ; ")
        values: dict[str, int] = {}
        for step in steps:
            name, _, *terms = step.split()
            if terms[0].isdigit():
                values[name] = int("".join(terms))
            else:
                left, operator, right = values[terms[0]], terms[1], int("".join(terms[2:]))
                values[name] = {"+": left + right, "-": left - right, "*": left * right}[operator] % 100
        assert f"{values[asked]:02d}" == problem.answer, problem


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be 'test' or 'calibration', was 'train'"):
        load_problems("train")


def test_archive_is_refused(monkeypatch):
    monkeypatch.setattr(bundled.resources, "files", lambda name: object())
    with pytest.raises(RuntimeError, match="archive"):
        bundled_pair()


def test_base_and_draft_load_and_fit():
    pair = bundled_pair()
    base = AutoModelForCausalLM.from_pretrained(pair.base)
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    draft = load_draft(pair.draft, embedding=base.get_input_embeddings())
    assert draft.config.vocab_size == base.config.vocab_size == 80
    assert (draft.source, len(draft.signals), draft.feature_layers) == ("output", 3, (2, 4, 5))
    assert draft.lm_head.dtype == base.dtype
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": load_problems("test")[0].question}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<think>\n\n")
