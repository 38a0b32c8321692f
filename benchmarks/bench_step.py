"""A decode step of the bundled pair, part by part: milliseconds and tensor operations, on any device.

    python benchmarks/bench_step.py [--device cpu] [--problems 4]

The text is compared with `generate`'s first; a step that decodes something else has no speed. Times are medians over
all steps, with the device waited for around each part, so their sum is more than a step takes on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specexit import ExitConfig, SpecExitDecoder, TreeConfig, bundled_pair, load_problems, loop, step
from specexit_kernels._op import OPS

# The order of a step. `step` is the whole of it; "other" is what no part covers.
PARTS = ("propose", "build_tree", "base", "choose", "accept", "compact_kv", "observe", "decide_exit")
VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "expand", "transpose", "permute", "slice", "select", "detach", "t"}
VIEWS |= {"alias", "flatten", "unflatten", "split", "unbind", "chunk", "as_strided", "_unsafe_view", "expand_as", "to"}
VIEWS |= {"_reshape_alias", "diagonal", "unfold", "contiguous"}


class Meter(TorchDispatchMode):
    """Time and tensor operations of each part; views, which compute nothing, are not counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.parts = ["other"]
        self.operations: Counter[str] = Counter()
        self.times: defaultdict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            self.operations[self.parts[-1]] += 1
        return func(*args, **(kwargs or {}))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.parts.append(part)
            self._wait()
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._wait()
                self.times[part].append(time.perf_counter() - began)
                self.parts.pop()

        return run

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def metered(decoder: SpecExitDecoder, meter: Meter) -> Iterator[None]:
    """Put the meter around every part of a step."""
    assert decoder.draft is not None
    decode_step = step.decode_step

    def whole(base: Any, draft: Any, config: Any, choose: Any, rules: Any, buffers: Any) -> Any:
        return decode_step(base, draft, config, meter.timed("choose", choose), rules, buffers)

    with ExitStack() as stack:
        for owner, name, part in (
            (decoder.base, "forward", "base"),
            (step, "accept", "accept"),
            (step, "compact_kv", "compact_kv"),
            (decoder.draft, "observe", "observe"),
            (step, "decide_exit", "decide_exit"),
            (decoder.draft, "propose", "propose"),
            (step, "build_tree", "build_tree"),
        ):
            stack.enter_context(patch.object(owner, name, meter.timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(loop, "decode_step", meter.timed("step", whole)))
        yield


def count(decoder: SpecExitDecoder, prompt: torch.Tensor, tree: TreeConfig) -> Counter[str]:
    """Tensor operations of one step. The ops' twins are called directly, so that what they do is counted too."""
    meter = Meter(decoder.device)
    whole = step.decode_step
    steps = iter(range(10**9))

    def third_only(*args: Any) -> Any:
        if next(steps) != 2:
            return whole(*args)
        with meter:
            return whole(*args)

    with ExitStack() as stack:
        for op in OPS.values():
            stack.enter_context(patch.object(op, "_dispatch", op.implementation(decoder.device.type).function))
        stack.enter_context(metered(decoder, meter))
        stack.enter_context(patch.object(loop, "decode_step", third_only))
        decoder.generate(prompt, temperature=0.0, tree=tree)
    return meter.operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU where there is one")
    parser.add_argument("--problems", type=int, default=4)
    arguments = parser.parse_args()
    pair = bundled_pair()
    decoder = SpecExitDecoder.from_pretrained(pair.base, pair.draft, device=arguments.device, dtype=torch.float32)
    assert decoder.tokenizer is not None
    prompts = [
        decoder.tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"].to(decoder.device)
        for problem in load_problems("test")[: arguments.problems]
    ]
    for prompt in prompts:
        expected = decoder.model.generate(prompt, do_sample=False)[0, prompt.shape[1] :].tolist()
        text = decoder.generate(prompt, temperature=0.0, exit=ExitConfig.off()).new_tokens[0]
        if text != expected:
            raise SystemExit("the decoder's text is not generate's: nothing is measured")

    print(f"device {decoder.device}, torch {torch.__version__}, threads {torch.get_num_threads()}")
    print("milliseconds (median) and tensor operations of a step; the exit is on")
    default, published = decoder.tree, TreeConfig(nodes=60, depth=5, top_k=10)
    for tree in dict.fromkeys((default, published)):
        meter = Meter(decoder.device)
        with metered(decoder, meter):
            for prompt in prompts:
                decoder.generate(prompt, temperature=0.0, tree=tree)
        operations = count(decoder, prompts[0], tree)
        print(f"\n{tree.nodes} nodes, depth {tree.depth}, top {tree.top_k}")
        for part in (*PARTS, "other"):
            ms = f"{1000 * statistics.median(meter.times[part]):8.2f}" if part in meter.times else " " * 8
            print(f"  {part:12}{ms}{operations[part]:8}")
        besides = sum(operations.values()) - operations["base"]
        print(f"  {'step':12}{1000 * statistics.median(meter.times['step']):8.2f}{sum(operations.values()):8}")
        print(f"  besides the base's forward: {besides} operations")


if __name__ == "__main__":
    main()
