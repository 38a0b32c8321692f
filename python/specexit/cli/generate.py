"""`specexit generate`: one prompt in, its text streamed to stdout, and on stderr why thinking stopped."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from specexit.cli.console import STANDARD_OUTPUT, require_writable, write_whole


@dataclass(frozen=True)
class Request:
    """What the command line asks for; the dictionaries hold only what was given.

    is_chat       whether `text` is a message; None: if the tokenizer has a chat template
    model, draft  None: the bundled pair's, or without a draft where only the model is given
    loading       device, dtype, capacity, allow_pickle of `SpecExitDecoder.from_pretrained`
    decoding      arguments of `SpecExitDecoder.generate`
    tree          fields of `TreeConfig`
    rule          where the exit rule comes from: the draft, the release, or none
    rule_name     which of the draft's calibrated rules; None: its default
    rule_changes  fields of `ExitConfig` that replace the rule's
    trace         whether the signals are wanted; without exit they would not be read otherwise
    """

    text: str
    is_chat: bool | None
    model: str | None
    draft: str | None
    loading: dict[str, Any]
    decoding: dict[str, Any]
    tree: dict[str, Any]
    rule: Literal["draft", "release", "off"]
    rule_name: str | None
    rule_changes: dict[str, Any]
    trace: bool


_INPUT, _MODEL, _DECODING, _TREE, _EXIT, _OUTPUT = "Input", "Model", "Decoding", "Token tree", "Exit", "Output"
_IDS = "Exit, in token ids; may be repeated, and what is not given is the tokenizer's"


def generate(
    prompt: Annotated[
        str | None, typer.Option(help="Continue this text as it is; - reads it from stdin.", rich_help_panel=_INPUT)
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(
            help="Answer this message, in the model's chat template; - reads it from stdin. Without either, stdin is "
            "the message, or the text where the tokenizer has no template.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB-ID", help="The base model; the bundled pair if not given.", rich_help_panel=_MODEL
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|HUB-ID", help="Its EAGLE-3 draft; none: plain decoding, budgets only.", rich_help_panel=_MODEL
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one.", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="float32 on a CPU, the checkpoint's on a GPU if not given.", rich_help_panel=_MODEL),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(min=1, help="Cache slots, a hard limit; it grows if not given.", rich_help_panel=_MODEL),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Accept a draft stored as a pickle.", rich_help_panel=_MODEL)
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The model's own default if not given.", rich_help_panel=_DECODING)
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.", rich_help_panel=_DECODING)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Keep the likeliest tokens up to this probability.", rich_help_panel=_DECODING
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Keep so many tokens; 0: all.", rich_help_panel=_DECODING)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Drop tokens below this share of the best one's probability.",
            rich_help_panel=_DECODING,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_DECODING)] = None,
    eos_token_id: Annotated[
        list[int] | None,
        typer.Option(help="Stop at this id instead of the model's own; may be repeated.", rich_help_panel=_DECODING),
    ] = None,
    tree_nodes: Annotated[
        int | None,
        typer.Option(help="Tokens verified a step, the last one included; 1: no speculation.", rich_help_panel=_TREE),
    ] = None,
    tree_depth: Annotated[int | None, typer.Option(help="Longest guess, in tokens.", rich_help_panel=_TREE)] = None,
    tree_top_k: Annotated[
        int | None, typer.Option(help="Guesses for each next token; 1: a chain.", rich_help_panel=_TREE)
    ] = None,
    no_exit: Annotated[
        bool, typer.Option("--no-exit", help="Let the model finish thinking.", rich_help_panel=_EXIT)
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="One of the draft's calibrated rules; its default if not given.", rich_help_panel=_EXIT
        ),
    ] = None,
    release: Annotated[
        bool,
        typer.Option(
            "--release", help="Start from the public release's rule, not the draft's own.", rich_help_panel=_EXIT
        ),
    ] = False,
    confidence: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|off", help="Exit only above this confidence; off: do not ask.", rich_help_panel=_EXIT
        ),
    ] = None,
    progress: Annotated[
        str | None, typer.Option(metavar="NUMBER|off", help="Exit only above this progress.", rich_help_panel=_EXIT)
    ] = None,
    remaining: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|off", help="Exit only below so many tokens still to think.", rich_help_panel=_EXIT
        ),
    ] = None,
    smoothing: Annotated[
        Literal["ewma", "none", "window", "momentum"] | None,
        typer.Option(help="Of the signals over tokens.", rich_help_panel=_EXIT),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Weight of the newest value (ewma).", rich_help_panel=_EXIT)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Values that count (window, momentum).", rich_help_panel=_EXIT)
    ] = None,
    granularity: Annotated[
        Literal["token", "step"] | None,
        typer.Option(help="Decide at each token, or once a step as the release does.", rich_help_panel=_EXIT),
    ] = None,
    source: Annotated[
        Literal["auto", "fc", "output"] | None,
        typer.Option(
            help="Read the signals on the draft's projected features, as the release does, or on its layer's output.",
            rich_help_panel=_EXIT,
        ),
    ] = None,
    min_thinking_tokens: Annotated[
        int | None, typer.Option(help="No exit by signals before so many.", rich_help_panel=_EXIT)
    ] = None,
    thinking_budget: Annotated[
        int | None,
        typer.Option(help="Stop thinking at the first paragraph end after so many tokens.", rich_help_panel=_EXIT),
    ] = None,
    hard_budget: Annotated[
        bool, typer.Option("--hard-budget", help="At the budget itself, paragraph or not.", rich_help_panel=_EXIT)
    ] = False,
    assume_thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--answering",
            help="Whether the prompt ends inside the thinking; its last marker says if not given.",
            rich_help_panel=_EXIT,
        ),
    ] = None,
    boundary_id: Annotated[list[int] | None, typer.Option(help="Ends a paragraph.", rich_help_panel=_IDS)] = None,
    start_id: Annotated[
        list[int] | None, typer.Option(help="Starts thinking; several in their order.", rich_help_panel=_IDS)
    ] = None,
    end_id: Annotated[
        list[int] | None, typer.Option(help="Ends thinking; several in their order.", rich_help_panel=_IDS)
    ] = None,
    force_id: Annotated[
        list[int] | None, typer.Option(help="Follows a cut; if not given, what ends thinking.", rich_help_panel=_IDS)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the signals at each thinking token as JSON.", rich_help_panel=_OUTPUT),
    ] = None,
) -> None:
    """Continue a prompt, and stop the thinking when the draft's signals say that the answer is known.

    The text goes to stdout as it comes, its thinking dimmed on a terminal; why thinking stopped and the statistics go
    to stderr. What is not given follows the model's generation_config.json, the device, and the draft's calibrated
    rule. Tree options that are given start from 60 nodes, depth 7 and top-k 10.

    The bundled pair knows one task: chains of + - * modulo 100, numbers as digits, as in the first example.

    Examples:

        specexit generate --chat 'a = 7 2 ; b = a - 8 ; c = b * 2 ; c ?'
        specexit generate --chat 'a = 5 3 ; b = a - 9 ; c = b + 4 ; c ?' --thinking-budget 60
        specexit generate --chat 'a = 5 3 ; b = a - 9 ; c = b + 4 ; c ?' --trace signals.json
        specexit generate --model ./base --draft ./draft --release < question.txt
        specexit generate --model Qwen/Qwen3-4B --temperature 0.6 --top-p 0.95 --seed 1
    """
    require_writable(trace, "--trace")
    if prompt is not None and chat is not None:
        raise ValueError("give --prompt or --chat, not both")
    if trace == STANDARD_OUTPUT:
        raise ValueError("--trace must be a file: stdout is for the text")
    if release + no_exit + (rule is not None) > 1:
        raise ValueError("give one of --rule, --release and --no-exit")
    signals = thresholds(confidence=confidence, progress=progress, remaining=remaining)
    changes = signals | given(
        smoothing=smoothing,
        alpha=alpha,
        window=window,
        granularity=granularity,
        source=source,
        min_thinking_tokens=min_thinking_tokens,
        thinking_budget=thinking_budget,
        hard_budget=hard_budget or None,
        assume_thinking=assume_thinking,
        boundary_ids=boundary_id,
        start_ids=start_id,
        end_ids=end_id,
        force_ids=force_id,
    )
    request = Request(
        text=read_text(prompt if chat is None else chat),
        is_chat=None if prompt is None and chat is None else chat is not None,
        model=model,
        draft=draft,
        loading=given(device=device, dtype=dtype, capacity=capacity, allow_pickle=allow_pickle or None),
        decoding=given(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            eos_token_id=eos_token_id,
        ),
        tree=given(nodes=tree_nodes, depth=tree_depth, top_k=tree_top_k),
        rule="off" if no_exit else "release" if release else "draft",
        rule_name=rule,
        rule_changes=changes,
        trace=trace is not None,
    )
    # Only now: torch and transformers take seconds to import, and a wrong option should be told at once.
    from specexit.cli.continuation import continue_text

    continuation = continue_text(request)
    if trace is not None:
        write_whole(trace, (json.dumps(continuation.trace()) + "\n").encode())


def given(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def thresholds(**options: str | None) -> dict[str, float | None]:
    """The thresholds that were given, "off" being None. Raises ValueError for anything else that is no number."""
    values: dict[str, float | None] = {}
    for name, text in options.items():
        if text is not None:
            try:
                values[name] = None if text == "off" else float(text)
            except ValueError:
                raise ValueError(f"--{name} must be a number or off, was {text}") from None
    return values


def read_text(text: str | None) -> str:
    """`text`, or stdin for None and "-", without its last line break. Raises ValueError where there is no text."""
    if text is None or text == "-":
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --chat or --prompt, or pipe the text in")
        text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise ValueError("the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python smuggles bytes that do not decode
        raise ValueError("the prompt is not valid UTF-8")
    return text
