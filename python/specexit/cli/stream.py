"""Text as it comes: a transformers streamer that knows what is thinking and what is answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer


class ThinkingStreamer(BaseStreamer):
    """Decodes the tokens of one sequence and hands them on in pieces of one kind.

    write     called with a piece of text and whether it is thinking; markers count as thinking
    start     ids that start thinking
    end       ids that end it
    thinking  whether the prompt ends inside thinking; None: as its last marker says. The attribute of that name says
              whether the text does, so far

    As transformers does, the first `put` is the prompt, which is not shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str, bool], None],
        start: Sequence[int],
        end: Sequence[int],
        thinking: bool | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._markers = [(list(start), True), (list(end), False)]
        self._assumed = thinking
        self.thinking = False
        self._ids: list[int] = []
        self._in_prompt = True
        # ids[:_shown] have been written; the text of ids[_context:_shown] is the context in which the next are decoded,
        # because a token's text can depend on those before it (spaces, and characters of several tokens).
        self._context = self._shown = 0

    def put(self, value: Tensor) -> None:
        """value: the prompt, [1, P] or [P], then new ids, any number at a time, [n] or [1, n]."""
        for token in value.flatten().tolist():
            before = self.thinking
            self._ids.append(token)
            for marker, thinking in self._markers:
                if marker and self._ids[-len(marker) :] == marker:
                    self.thinking = thinking
            if not self._in_prompt and before != self.thinking:
                if not before:  # the text before a start marker is no thinking, and must be out before it
                    marker = self._markers[0][0]
                    self._flush(max(len(self._ids) - len(marker), self._shown), False)
                self._flush(len(self._ids), True)
        if self._in_prompt:
            self._in_prompt = False
            self.thinking = self.thinking if self._assumed is None else self._assumed
            self._context = self._shown = len(self._ids)
        self._flush(len(self._ids), self.thinking, complete=False)

    def end(self) -> None:
        self._flush(len(self._ids), self.thinking)

    def _flush(self, stop: int, thinking: bool, complete: bool = True) -> None:
        """Write ids[shown:stop]; unless `complete`, keep back a character that waits for its other bytes."""
        context = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context : stop])
        if not complete and text.endswith("\ufffd"):
            return
        piece = text[len(context) :]
        if piece:
            self._write(piece, thinking)
            self._context = self._shown
        self._shown = stop

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
