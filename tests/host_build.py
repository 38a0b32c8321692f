"""Builds the CUDA kernels for the host: their sources, unchanged, as C++ against `cuda_on_host`, in three variants."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
EMULATION = ROOT / "tests" / "cuda_on_host"
BUILD = ROOT / "build" / "host_run"
JOBS = 2  # compilers at a time
SECTION = "host_run_shared"  # of `__shared__` variables, as in cuda_on_host/scheduler.cpp

Edit = tuple[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernels, and what a process that loads them needs.

    flags        for kernels, and for linking; the emulation itself is never instrumented
    defines      for kernels and the emulation
    preload      libraries that must be in the process from its start
    environment  options of the sanitizer: end at the first report, with a status that pytest does not use
    """

    flags: tuple[str, ...]
    defines: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


VARIANTS = {
    "plain": Variant(("-O2",)),
    "asan": Variant(
        ("-O1", "-g", "-fsanitize=address,undefined,bounds-strict", "-fno-sanitize-recover=all"),
        ("-DHOST_RUN_ASAN",),
        # libstdc++ is there before AddressSanitizer looks for what throws exceptions: Python itself does not link it.
        ("libasan.so", "libubsan.so", "libstdc++.so.6"),
        (
            ("ASAN_OPTIONS", "detect_leaks=0:exitcode=99"),
            ("UBSAN_OPTIONS", "print_stacktrace=1:halt_on_error=1:exitcode=99"),
        ),
    ),
    "tsan": Variant(
        ("-O1", "-g", "-fsanitize=thread"),
        ("-DHOST_RUN_TSAN",),
        ("libtsan.so", "libstdc++.so.6"),
        # Python and torch are not instrumented: what they do between launches is not under test.
        (("TSAN_OPTIONS", "halt_on_error=1:exitcode=99:ignore_noninstrumented_modules=1:atexit_sleep_ms=0"),),
    ),
}

# As nvcc treats the sources: bytes may be read as another type, and locals hold anything at first. A product and a
# sum are not fused, so that results do not depend on the host's instructions.
COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fmax-errors=3",
)
KERNEL = ("-ftrivial-auto-var-init=pattern", f"-I{EMULATION / 'include'}", "-include", "cuda_runtime.h", "-x", "c++")


@functools.cache
def absent() -> str | None:
    """Why kernels cannot be built and run here in every variant; None where they can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if shutil.which("objcopy") is None:
        return "there is no objcopy"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python (Python.h) are not installed"
    return next(filter(None, map(_failure, VARIANTS)), None)


def _failure(variant: str) -> str | None:
    """Why an empty program of a variant does not build or run: not GCC, or GCC before 12; no sanitizer, or one that
    this system's addresses are too random for. None where it runs."""
    key = hashlib.sha256("\0".join((_compiler(), *COMMON, *KERNEL, *VARIANTS[variant].flags)).encode()).hexdigest()[:20]
    mark = BUILD / "works" / f"{variant}-{key}"
    if mark.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("int main() {}\n")
        flags = [*COMMON, *VARIANTS[variant].flags, "-ftrivial-auto-var-init=pattern"]
        for command in (["g++", *flags, str(source), "-o", str(program)], [str(program)]):
            done = subprocess.run(command, capture_output=True, text=True, env=_without_preload())
            if done.returncode:
                return f"{variant}: {(done.stderr.strip() or f'exit status {done.returncode}').splitlines()[0]}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return None


def build_module(variant: str, edits: Mapping[str, Edit] | None = None) -> Path:
    """The path of `_C` for the host, built where it is not there already.

    edits   what to change in copies of files of csrc, by file name: (old, new), where old must occur once, or a
            function of the text. Only objects that include an edited file are compiled anew.
    Raises RuntimeError with the compiler's message.
    """
    with _alone(), _edited(edits or {}) as folder:
        return _link(variant, _objects(variant, folder), "_C" + sysconfig.get_config_var("EXT_SUFFIX"), ("-shared",))


def build_program(variant: str, source: Path) -> Path:
    """The path of a program made of one file with kernels and a `main`."""
    with _alone():
        return _link(variant, [_kernel(variant, source), *_emulation(variant)], source.stem, ())


def load(path: Path) -> ModuleType:
    """The module at the path, as the `specexit_kernels._C` of this process."""
    name = "specexit_kernels._C"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def environment(variant: str) -> dict[str, str]:
    """This process's environment, for one that loads code of the variant."""
    chosen = VARIANTS[variant]
    preload = [_run(["g++", f"-print-file-name={name}"]).strip() for name in chosen.preload]
    return {**os.environ, **dict(chosen.environment), **({"LD_PRELOAD": " ".join(preload)} if preload else {})}


@contextmanager
def _alone() -> Iterator[None]:
    """Nobody else builds meanwhile: workers of xdist would write the same files."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _edited(edits: Mapping[str, Edit]) -> Iterator[Path]:
    """csrc, or a copy of it with the edits."""
    if not edits:
        yield CSRC
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / CSRC.name
        shutil.copytree(CSRC, folder)
        for name, edit in edits.items():
            text = (folder / name).read_text()
            if callable(edit):
                changed = edit(text)
            else:
                if text.count(edit[0]) != 1:
                    raise ValueError(
                        f"{name} must hold the text to edit once, held it {text.count(edit[0])} times: {edit[0]!r}"
                    )
                changed = text.replace(*edit)
            if changed == text:
                raise ValueError(f"the edit of {name} changes nothing")
            (folder / name).write_text(changed)
        yield folder


@dataclass(frozen=True)
class _Object:
    """One call of the compiler; `inputs` are all files that it reads of ours."""

    source: Path
    flags: tuple[str, ...]
    inputs: tuple[Path, ...]
    is_kernel: bool = False

    def path(self) -> Path:
        digest = hashlib.sha256("\0".join((_compiler(), *self.flags)).encode())
        for file in self.inputs:
            digest.update(b"\0" + file.name.encode() + b"\0" + file.read_bytes())
        return BUILD / "objects" / f"{self.source.stem}-{digest.hexdigest()[:20]}.o"

    def compile(self) -> Path:
        target = self.path()
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            new = f"{target}.new"
            names = f"-ffile-prefix-map={self.source.parent.parent}/="  # messages say csrc/build_tree.cu
            _run(["g++", *COMMON, names, *self.flags, "-c", str(self.source), "-o", new])
            if self.is_kernel:
                self._gather_shared(new)
            os.replace(new, target)
        return target

    def _gather_shared(self, target: str) -> None:
        """All static variables of kernels are `__shared__` ones: into a section of their own, for the emulation to fill
        with garbage. Those of templates and inline functions with external linkage are in neither that section nor
        between red zones of AddressSanitizer."""
        if found := re.search(r"^\S+ u (_ZZ\S+)$", _run(["nm", target]), re.MULTILINE):
            name = _run(["c++filt", found[1]]).strip()
            raise RuntimeError(
                f"{self.source.name}: {name} must have internal linkage: an anonymous namespace around it"
            )
        _run(["objcopy", "--rename-section", f".bss={SECTION},alloc,contents,data", target])


def _objects(variant: str, folder: Path) -> list[_Object]:
    kernels = [_kernel(variant, source) for source in sorted(folder.glob("*.cu"))]
    return [*kernels, _bindings(folder), *_emulation(variant)]


def _kernel(variant: str, source: Path) -> _Object:
    chosen = VARIANTS[variant]
    headers = sorted([*EMULATION.glob("*.h"), *EMULATION.glob("include/*.h")])
    inputs = (*_includes(source), *headers)
    return _Object(source, (*chosen.flags, *chosen.defines, *KERNEL), inputs, is_kernel=True)


def _emulation(variant: str) -> list[_Object]:
    headers = sorted([*EMULATION.glob("*.h"), *EMULATION.glob("include/*.h")])
    flags = ("-O2", *VARIANTS[variant].defines, f"-I{EMULATION / 'include'}")
    return [_Object(source, flags, (source, *headers)) for source in sorted(EMULATION.glob("*.cpp"))]


def _bindings(folder: Path) -> _Object:
    import pybind11

    version = re.search(r'__version__ = "(.*?)"', (ROOT / "specexit_kernels" / "_version.py").read_text())
    assert version is not None
    flags = (
        "-O1",
        f"-I{EMULATION / 'include'}",
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_path('include')}",
        f'-DSPECEXIT_VERSION="{version[1]}"',
        '-DSPECEXIT_ARCHITECTURES="host"',
    )
    source = folder / "bindings.cpp"
    return _Object(source, flags, (*_includes(source), EMULATION / "include" / "cuda_runtime_api.h"))


def _includes(source: Path) -> list[Path]:
    """The file and those beside it that it includes, at whatever remove."""
    found = [source]
    for file in found:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE):
            included = file.parent / name
            if included.exists() and included not in found:
                found.append(included)
    return found


def _link(variant: str, objects: Sequence[_Object], name: str, flags: Sequence[str]) -> Path:
    with ThreadPoolExecutor(JOBS) as pool:
        paths = list(pool.map(_Object.compile, objects))
    digest = hashlib.sha256("\0".join((variant, name, *sorted(path.name for path in paths))).encode()).hexdigest()[:20]
    target = BUILD / variant / digest / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _run(["g++", *VARIANTS[variant].flags, "-pthread", *flags, *map(str, paths), "-o", f"{target}.new"])
        os.replace(f"{target}.new", target)
    return target


@functools.cache
def _compiler() -> str:
    return _run(["g++", "--version"]).partition("\n")[0]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=_without_preload())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _without_preload() -> dict[str, str]:
    """A compiler is not under test."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
