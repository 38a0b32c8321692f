"""Triton's interpreter, made strict: every access of a kernel must lie within a tensor that it was given.

The interpreter reads whatever lies at an address, multiplies bfloat16 matrices as if their bits were integers, and cuts
off what does not fit when it rounds to bfloat16. Within `guarded()` an access out of bounds raises IndexError, and
`tl.dot` and conversions are right. (Other arithmetic on bfloat16 is wrong there too: kernels cast to fp32 right after a
load.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from attention_cases import span
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder


class Bounds:
    """The addresses of a launch's tensors, which are on the host already: copied neither to it nor back."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def take(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        self.ranges = [(t.data_ptr(), t.data_ptr() + span(t) * t.element_size()) for t in tensors]
        return list(args), dict(kwargs)

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        where = pointers.data
        if mask is not None:
            where = where[np.broadcast_to(mask.data.astype(bool), where.shape)]
        where = np.asarray(where, dtype=np.uint64).ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(where.shape, dtype=bool)
        for first, last in self.ranges:
            inside |= (where >= np.uint64(first)) & (where + np.uint64(size) <= np.uint64(last))
        if not inside.all():
            program = interpreter.interpreter_builder.grid_idx
            raise IndexError(f"{what} of {int((~inside).sum())} elements out of bounds in program {program}")


def exact(handle: Any) -> Any:
    """A matrix of bfloat16, which the interpreter keeps as 16-bit integers, in fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(handle: Any) -> Any:
    """A tensor of fp32 in bfloat16: to the nearest, of two the even one."""
    bits = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16().view(torch.uint16).numpy()
    return interpreter.TensorHandle(bits, tl.bfloat16)


@contextmanager
def guarded() -> Iterator[None]:
    """Strict as above, for the kernels that are launched within."""
    patched: set[int] = set()
    bounds, dot, cast = Bounds(), Builder.create_dot, Builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, exact(a), exact(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        kinds = source.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return rounded(source)
        return exact(source) if kinds == (tl.bfloat16, tl.float32) else cast(self, source, to)

    def checked(original: Callable[..., Any], what: str, pointer: int, mask: int | None) -> Callable[..., Any]:
        def access(self: Any, *args: Any) -> Any:
            bounds.check(what, args[pointer], None if mask is None else args[mask])
            return original(self, *args)

        return access

    def take(*args: Any) -> Any:
        patched.clear()
        return bounds.take(*args)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function that a kernel calls: the language is exchanged for the interpreter's once a launch and module, and
        not in every call, which would take a third of the time."""
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    # Name, and where among the arguments its pointers and its mask are. The masked ones serve all loads and stores
    # of kernels; the others and atomics are not used.
    with ExitStack() as stack:
        stack.enter_context(patch.object(Builder, "create_dot", create_dot))
        stack.enter_context(patch.object(Builder, "cast_impl", cast_impl))
        stack.enter_context(patch.object(interpreter.InterpretedFunction, "__call__", call))
        for name, pointer, mask in (
            ("create_load", 0, None),
            ("create_store", 0, None),
            ("create_masked_load", 0, 1),
            ("create_masked_store", 0, 2),
            ("create_atomic_rmw", 1, 3),
            ("create_atomic_cas", 0, None),
        ):
            stack.enter_context(patch.object(Builder, name, checked(getattr(Builder, name), name[7:], pointer, mask)))
        stack.enter_context(patch.object(interpreter.GridExecutor, "_init_args_hst", take))
        stack.enter_context(patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *a: None))
        yield
