"""A decode step of the bundled pair, part by part: milliseconds and tensor operations, on any device.

The text is compared with `generate`'s first; a step that decodes something else has no speed.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.step_parts import CALLER, PARTS, Meter, metered
from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair, load_problems
from specexit_kernels._op import OPS

PUBLISHED = TreeConfig(nodes=60, depth=5, top_k=10)


def report(device: torch.device, problems: int) -> None:
    """Print the parts, medians over all steps on the first problems, for the decoder's own tree and the published one.

    Raises SystemExit where the text is not `generate`'s.
    """
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, device=device, dtype=torch.float32, graph=False)
    prompts = _prompts(decoder, problems)
    for prompt in prompts:
        expected = decoder.model.generate(prompt, do_sample=False)[0, prompt.shape[1] :].tolist()
        text = decoder.generate(prompt, temperature=0.0, exit=ExitConfig.off()).new_tokens[0]
        if text != expected:
            raise SystemExit("the decoder's text is not generate's: nothing is measured")

    print(f"the bundled pair on {decoder.device}, torch {torch.__version__}, threads {torch.get_num_threads()}")
    print("milliseconds (median) and tensor operations of a step; the exit is on")
    for tree in dict.fromkeys((decoder.tree_for(1), PUBLISHED)):
        meter = Meter(decoder.device)
        with metered(meter):
            for prompt in prompts:
                decoder.generate(prompt, temperature=0.0, tree=tree)
        operations = count(decoder, prompts[0], tree)
        print(f"\n{tree.nodes} nodes, depth {tree.depth}, top {tree.top_k}")
        for part in (*PARTS, "other"):
            print(_line(part, meter.milliseconds(part), operations[part]))
        print(_line("step", meter.milliseconds("step"), operations.total()))
        print(f"  besides the base's forward: {operations.total() - operations['base']} operations")


def count(decoder: SpecExitDecoder, prompt: torch.Tensor, tree: TreeConfig) -> Counter[str]:
    """Tensor operations of one step. The ops' twins are called directly, so that what they do is counted too."""
    meter = Meter(decoder.device)
    steps = iter(range(10**9))
    with ExitStack() as stack:
        for op in OPS.values():
            stack.enter_context(patch.object(op, "_dispatch", op.implementation(decoder.device.type).function))
        stack.enter_context(metered(meter))
        whole = CALLER.decode_step

        def third_only(*args: Any) -> Any:
            if next(steps) != 2:
                return whole(*args)
            with meter:
                return whole(*args)

        stack.enter_context(patch.object(CALLER, "decode_step", third_only))
        decoder.generate(prompt, temperature=0.0, tree=tree)
    return meter.operations


def _prompts(decoder: SpecExitDecoder, problems: int) -> list[torch.Tensor]:
    assert decoder.tokenizer is not None
    chats = ([{"role": "user", "content": problem.question}] for problem in load_problems("test")[:problems])
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return [decoder.tokenizer.apply_chat_template(chat, **options)["input_ids"].to(decoder.device) for chat in chats]


def _line(part: str, milliseconds: float | None, operations: int) -> str:
    ms = " " * 8 if milliseconds is None else f"{milliseconds:8.2f}"
    return f"  {part:12}{ms}{operations:8}"
