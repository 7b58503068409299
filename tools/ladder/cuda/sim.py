"""Run a CUDA source file on the CPU and see what it does.

    sim = CudaSim.build("csrc/cuda/divergence.cu", hooks=True)
    report = sim.call("pyd_divergence", 0, logits, out, rows, columns,
                      buffers={"logits": logits, "out": out}, order="random:3")
    report.buffers["logits"].bytes_loaded

The file is compiled as C++ (1 to 3 s, cached by the content of the source and all it includes) with
`cusim.h` in place of the CUDA compiler. Without hooks a run checks values and collectives; with
hooks every load and store is seen as well, at about ten times the cost.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
import mmap
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
ORDERS = {"forward": 0, "reverse": 1, "random": 2}

# -fno-tree-sra keeps a 16-byte load one load; unique symbols would make two builds of one template
# kernel share their shared memory.
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-DCUSIM",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-fno-threadsafe-statics",
)
KERNEL_FLAGS = ("-x", "c++", "-O1", "-fno-tree-sra")
HOOK_FLAGS = ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")


class CudaBuildError(RuntimeError):
    """The source does not compile; the message holds the compiler's words."""


class CudaSimError(RuntimeError):
    """A launch did something a GPU would not survive; `report` tells how far it came."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Traffic:
    """What one buffer saw. A request is one warp's access at one place of the code."""

    bytes_loaded: int
    bytes_stored: int
    bytes_atomic: int
    load_requests: int
    load_sectors: int
    store_requests: int
    store_sectors: int

    @property
    def bytes_moved(self) -> int:
        return self.bytes_loaded + self.bytes_stored + self.bytes_atomic


@dataclass(frozen=True)
class Report:
    """One call. The counts are zero and the lists empty when the library was built without hooks.

    `status` is what the launcher returned, `error` the reason of a failed launch. `races` holds
    the first few of `race_count` data races, `oob` an out-of-bounds or misaligned access, which
    ends the launch.
    """

    status: int
    launches: int
    error: str = ""
    buffers: Mapping[str, Traffic] = field(default_factory=dict)
    shared_loaded: int = 0
    shared_stored: int = 0
    shared_atomic: int = 0
    race_count: int = 0
    races: tuple[str, ...] = ()
    oob: tuple[str, ...] = ()

    @property
    def bytes_moved(self) -> int:
        return sum(traffic.bytes_moved for traffic in self.buffers.values())


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "pydistill" / "ladder"


def cuda_headers() -> Path:
    """CUDA's own vector, fp16 and bf16 types. Triton ships them, so no CUDA toolkit is needed."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the CUDA headers come with Triton: pip install triton")
    return Path(spec.origin).parent / "backends" / "nvidia" / "include"


def source_closure(source: Path, include_dirs: Sequence[Path]) -> list[Path]:
    """The source and every header it includes by quotes, directly or not."""
    found: list[Path] = []
    todo = [source]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            candidates = (folder / name for folder in (path.parent, *include_dirs))
            todo += [next((c.resolve() for c in candidates if c.is_file()), path)]
    return found


def content_key(paths: Sequence[Path], command: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def run_compiler(command: Sequence[str], out: Path) -> Path:
    """Runs `command -o out` unless `out` exists; a finished file appears at once or not at all."""
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        fresh = Path(folder) / out.name
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise CudaBuildError(f"{' '.join(command)}\n{done.stderr.strip()}")
        os.replace(fresh, out)
    return out


@functools.cache
def _compiler() -> tuple[str, str]:
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return compiler, done.stdout.splitlines()[0]


def _compile(source: Path, flags: Sequence[str], include_dirs: Sequence[Path]) -> Path:
    compiler, version = _compiler()
    folders = [HERE, *include_dirs]
    system = ["-isystem", str(HERE / "include"), "-isystem", str(cuda_headers())]
    options = [*FLAGS, *flags, *(f"-I{folder}" for folder in folders), *system]
    key = content_key(source_closure(source, folders), [version, *options])
    out = cache_folder() / f"{source.stem}-{key}.o"
    return run_compiler([compiler, *options, "-c", str(source)], out)


def _shared_variables(library: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of every shared variable: the thread-local symbols of the library."""
    table = subprocess.run(
        ["readelf", "-sWC", str(library)], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split(maxsplit=7) for line in table.splitlines())
    return [
        (row[7], int(row[1], 16), int(row[2], 0))
        for row in rows
        if len(row) == 8 and row[3] == "TLS" and not row[7].endswith("::shared_anchor")
    ]


@dataclass(frozen=True)
class StructArgument:
    """A C struct passed by pointer, and the tensors that its pointers point to, by field."""

    struct: ctypes.Structure
    tensors: Mapping[str, torch.Tensor]


C_TYPES: dict[str, Any] = {
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def struct_argument(header: str | os.PathLike[str], name: str, **fields: Any) -> StructArgument:
    """A value of the plain C struct `name` declared in `header`.

    Reading the declaration keeps Python from carrying a second copy of the layout. Pointer fields
    take a tensor or None, the others a number; fields that are not given are zero.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", Path(header).read_text(), flags=re.DOTALL)
    found = re.search(rf"\bstruct\s+{name}\s*\{{(.*?)\}}\s*;", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{header} declares no struct {name}")
    layout: list[tuple[str, Any]] = []
    for declaration in filter(None, map(str.strip, found[1].split(";"))):
        words = re.fullmatch(r"(?:const\s+)?(\w+)\s*(\*?)\s*([\w\s,]+)", declaration)
        if words is None or not (words[2] or words[1] in C_TYPES):
            raise ValueError(f"cannot read the declaration {declaration!r} of struct {name}")
        kind = ctypes.c_void_p if words[2] else C_TYPES[words[1]]
        layout += [(field.strip(), kind) for field in words[3].split(",")]
    if unknown := fields.keys() - dict(layout).keys():
        raise ValueError(f"struct {name} has no field {', '.join(sorted(unknown))}")
    struct = type(name, (ctypes.Structure,), {"_fields_": layout})()
    tensors = {key: value for key, value in fields.items() if isinstance(value, torch.Tensor)}
    for key, value in fields.items():
        setattr(struct, key, value.data_ptr() or None if key in tensors else value)
    return StructArgument(struct, tensors)


def virtual_tensor(shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where touched, for offsets beyond 2^31 elements."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, size, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(*shape)


class CudaSim:
    """A CUDA source file compiled for the CPU. Build one with `CudaSim.build`."""

    def __init__(self, library: Path, *, hooks: bool) -> None:
        self.path = library
        self.hooks = hooks
        self._library = ctypes.CDLL(str(library))
        for name in ("cusim_error", "cusim_error_kind", "cusim_memory_report"):
            if hooks or name != "cusim_memory_report":
                getattr(self._library, name).restype = ctypes.c_char_p
        self._library.cusim_launches.restype = ctypes.c_int64
        if hooks:
            for symbol, offset, size in _shared_variables(library):
                self._library.cusim_add_shared_variable(
                    symbol.encode(), ctypes.c_uint64(offset), ctypes.c_uint64(size)
                )

    @classmethod
    def build(
        cls,
        source: str | os.PathLike[str],
        *,
        hooks: bool = False,
        include_dirs: Sequence[str | os.PathLike[str]] = (),
        defines: Sequence[str] = (),
    ) -> CudaSim:
        """Compiles `source` (or finds it in the cache) and loads it.

        `csrc/` is on the include path. Raises `CudaBuildError` with the compiler's message.
        """
        path = Path(source).resolve()
        if not path.is_file():
            raise ValueError(f"no CUDA source at {path}")
        folders = [*(Path(folder).resolve() for folder in include_dirs), CSRC]
        flags = [*KERNEL_FLAGS, *(HOOK_FLAGS if hooks else ()), *(f"-D{d}" for d in defines)]
        objects = [_compile(path, flags, folders), _compile(HERE / "cusim.cpp", ["-O2"], [])]
        if hooks:
            objects.append(_compile(HERE / "cusim_mem.cpp", ["-O2"], []))
        key = content_key(objects, [])
        library = run_compiler(
            [_compiler()[0], "-shared", *map(str, objects)],
            cache_folder() / f"{path.stem}-{key}.so",
        )
        return cls(library, hooks=hooks)

    def call(
        self,
        name: str,
        *args: Any,
        buffers: Mapping[str, torch.Tensor] | None = None,
        order: str = "forward",
        shared_limit: int | None = None,
        check: bool = True,
    ) -> Report:
        """Calls the launcher `name` with `args` and a null stream appended.

        Tensors travel as their data pointer, integers as int64, floats as C float, None as a null
        pointer, a `StructArgument` as a pointer to its struct; a ctypes value travels as it is.
        With hooks, a kernel may touch the tensors in `buffers`, among `args` and in structs, each
        within its own view, and nothing else. The report calls them by the name in `buffers`, by
        the struct's field, or arg0, arg1, ... `order` is "forward", "reverse" or "random:SEED",
        the order of threads and blocks. `shared_limit` is how many bytes of dynamic shared memory a
        launch may have, sm_90's if not given.

        Raises `CudaSimError` when the launcher fails, or, with hooks, on a data race; with
        `check=False` the report tells instead.
        """
        kind, _, seed = order.partition(":")
        if kind not in ORDERS or (seed and not seed.isdigit()):
            raise ValueError(f"unknown order {order!r}; use forward, reverse or random:SEED")
        named = _named_tensors(args, buffers or {})
        masks = self._begin(ORDERS[kind], int(seed or 1), shared_limit, named)
        function = self._library[name]
        function.restype = ctypes.c_int
        status = int(function(*map(_to_c, args), ctypes.c_void_p(None)))
        del masks  # the library reads the views' masks during the call
        report = self._report(status)
        if check and (status or report.race_count):
            raise CudaSimError(
                report.error
                or (report.races[0] if report.races else f"{name} returned error code {status}"),
                report,
            )
        return report

    def _begin(
        self, order: int, seed: int, shared_limit: int | None, named: Mapping[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        limit = ctypes.c_int64(-1 if shared_limit is None else shared_limit)
        self._library.cusim_begin(ctypes.c_int(order), ctypes.c_uint32(seed), limit)
        masks: list[torch.Tensor] = []
        if not self.hooks:
            return masks
        self._library.cusim_memory_begin()
        for name, tensor in named.items():
            extent, mask = _view_extent(tensor)
            if mask is not None:
                masks.append(mask)
            self._library.cusim_add_buffer(
                name.encode(),
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_uint64(extent * tensor.element_size()),
                ctypes.c_uint64(tensor.element_size()),
                ctypes.c_void_p(None if mask is None else mask.data_ptr()),
            )
        return masks

    def _report(self, status: int) -> Report:
        error = self._library.cusim_error().decode()
        kind = self._library.cusim_error_kind().decode()
        launches = int(self._library.cusim_launches())
        if not self.hooks:
            return Report(status, launches, error)
        seen = json.loads(self._library.cusim_memory_report())
        return Report(
            status,
            launches,
            error,
            buffers={name: _traffic(entry) for name, entry in seen["buffers"].items()},
            shared_loaded=seen["shared_loaded"],
            shared_stored=seen["shared_stored"],
            shared_atomic=seen["shared_atomic"],
            race_count=seen["race_count"],
            races=tuple(seen["races"]),
            oob=(error,) if kind == "bounds" else (),
        )


def _traffic(entry: Mapping[str, Any]) -> Traffic:
    loads, stores = entry["loads"], entry["stores"]
    return Traffic(
        bytes_loaded=loads["bytes"],
        bytes_stored=stores["bytes"],
        bytes_atomic=entry["atomic_bytes"],
        load_requests=loads["requests"],
        load_sectors=loads["sectors"],
        store_requests=stores["requests"],
        store_sectors=stores["sectors"],
    )


def _named_tensors(
    args: Sequence[Any], buffers: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors a kernel may touch, by name; the same view under two names appears once."""
    named: dict[str, torch.Tensor] = {}
    views: set[tuple[object, ...]] = set()
    unnamed: dict[str, torch.Tensor] = {}
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            unnamed[f"arg{i}"] = arg
        elif isinstance(arg, StructArgument):
            unnamed.update(arg.tensors)
    for name, tensor in [*buffers.items(), *unnamed.items()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"buffer {name} is on {tensor.device}; cusim runs on CPU tensors")
        view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and view not in views:
            views.add(view)
            named[name] = tensor
    return named


def _view_extent(tensor: torch.Tensor) -> tuple[int, torch.Tensor | None]:
    """Elements from the first to the last of a view, and which of them belong to it."""
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    extent = 1 + sum((size - 1) * stride for size, stride in pairs)
    if tensor.numel() == extent:
        return extent, None
    mask = virtual_tensor((extent,), dtype=torch.uint8)
    mask.as_strided(tensor.shape, tensor.stride()).fill_(1)
    return extent, mask


def _to_c(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr() if value.numel() else None)
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, int):  # bool too
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, StructArgument):
        return ctypes.byref(value.struct)
    if isinstance(value, ctypes._SimpleCData):
        return value
    raise TypeError(f"cannot pass {type(value).__name__} to C; use a tensor, int, float or ctypes")
