"""How an operator is declared: a schema, its PyTorch twin, a fake, and the kernels that may stand in for the twin.

Each op module makes one `Op`. The twin is the meaning of the op; it serves the CPU, unless the op names something
faster there, and CUDA until a kernel is registered. `torch.library` carries the op through `torch.compile`, `opcheck`
and the fake tensors.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = torch.library.Library("specexit", "DEF")
OPS: dict[str, Op] = {}  # filled once, when the package is imported; read by `specexit_kernels.implementations()`

KERNELS = ("cuda", "triton")  # best first; the twin, "torch", is the fallback and always there


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    name      "torch", "sdpa", "triton" or "cuda"
    function  with the schema's arguments
    absent    None, or what is missing here and how to get it
    limit     what, of the op's arguments, it cannot take: a message, or None where it can
    """

    name: str
    function: Callable[..., Any]
    absent: str | None = None
    limit: Callable[..., str | None] | None = None

    def takes(self, args: Sequence[Any] | None) -> bool:
        """Whether it can run here, with these arguments where any are given."""
        return self.absent is None and (args is None or self.limit is None or self.limit(*args) is None)


class Op:
    """An operator of the `specexit` library.

    schema      as `torch.library` writes it, without the namespace: "verify_tree(Tensor tokens, ...) -> (Tensor, ...)"
    reference   the twin, in plain PyTorch, with the schema's arguments; its results alias no argument
    fake        the twin's outputs, empty: shapes, dtypes and strides
    cpu         name and function of what the CPU runs in place of the twin
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        cpu: tuple[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.twin = Implementation("torch", reference)
        self.cpu = Implementation(*cpu) if cpu else self.twin
        self.kernels: dict[str, Implementation] = {}
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._on_cpu, "CPU")
        LIBRARY.impl(self.name, self._on_cuda, "CUDA")
        torch.library.register_fake(f"specexit::{self.name}", fake, lib=LIBRARY)
        self._dispatch = getattr(torch.ops.specexit, self.name).default
        OPS[self.name] = self

    def register_kernel(
        self,
        name: str,
        function: Callable[..., Any],
        absent: str | None = None,
        limit: Callable[..., str | None] | None = None,
    ) -> None:
        """Add a GPU implementation; `absent` and `limit` as in `Implementation`. The twin takes what it cannot."""
        if name not in KERNELS:
            raise ValueError(f"name must be one of {KERNELS}, was {name!r}")
        self.kernels[name] = Implementation(name, function, absent, limit)

    def register_module(
        self, name: str, module: str, absent: str | None, limit: Callable[..., str | None] | None = None
    ) -> None:
        """Add the GPU implementation `<op>_<name>` of `module`, which is imported when it is first called."""

        @functools.cache
        def kernel() -> Callable[..., Any]:
            function: Callable[..., Any] = getattr(importlib.import_module(module), f"{self.name}_{name}")
            return function

        self.register_kernel(name, lambda *arguments: kernel()(*arguments), absent, limit)

    def implementation(self, device: str, args: Sequence[Any] | None = None) -> Implementation:
        """The implementation that runs for tensors on `device` ("cpu" or "cuda"): usually, or for these arguments."""
        if device == "cpu":
            return self.cpu
        for name in KERNELS:
            if name in self.kernels and self.kernels[name].takes(args):
                return self.kernels[name]
        return self.twin

    def __call__(self, *args: Any, implementation: str | None = None) -> Any:
        """Run the op: the best implementation for the tensors' device, or the one that is asked for by name."""
        if implementation is None:
            if _is_eager_on_cpu(args[0]):
                return self.cpu.function(*args)
            return self._dispatch(*args)
        if implementation == "torch":
            return self.twin.function(*args)
        kernel = self.cpu if implementation == self.cpu.name else self.kernels.get(implementation)
        if kernel is None:
            known = ", ".join(dict.fromkeys(["torch", self.cpu.name, *self.kernels]))
            raise ValueError(f"implementation: {self.name} has {known}; there is no {implementation!r}")
        if kernel.absent is not None:
            raise RuntimeError(f"implementation={implementation!r} of {self.name} cannot run here: {kernel.absent}")
        if kernel.limit is not None and (reason := kernel.limit(*args)):
            raise ValueError(f"implementation={implementation!r} of {self.name}: {reason}")
        return kernel.function(*args)

    def _on_cpu(self, *args: Any) -> Any:
        return self.cpu.function(*args)

    def _on_cuda(self, *args: Any) -> Any:
        return self.implementation("cuda", args).function(*args)


def _is_eager_on_cpu(argument: Any) -> bool:
    """Whether an op's first argument, a tensor or a list of them, is an ordinary one in memory. The dispatcher then has
    nothing to decide, and takes as long as two small tensor operations: a tenth of a decode step on a CPU. Under a
    dispatch mode or the profiler such a call shows as the operations of its implementation."""
    if isinstance(argument, (list, tuple)) and argument:
        argument = argument[0]
    return type(argument) is torch.Tensor and argument.is_cpu and not torch.compiler.is_compiling()


def implementations() -> dict[str, dict[str, str]]:
    """For every op, the implementation that a CPU and a CUDA tensor would get, and why none faster is used.

    Example: {"verify_tree": {"cpu": "torch", "cuda": "torch", "why": "cuda: the native module is not built; ..."}}
    """
    table = {}
    for name, op in sorted(OPS.items()):
        why = "; ".join(f"{kernel.name}: {kernel.absent}" for kernel in op.kernels.values() if kernel.absent)
        table[name] = {"cpu": op.implementation("cpu").name, "cuda": op.implementation("cuda").name, "why": why}
    return table
