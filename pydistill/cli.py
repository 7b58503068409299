"""The command `pydistill`: what this machine will use, whether it is right, how fast, and the demo.

Results go to stdout, progress and errors to stderr; `--json` makes stdout one JSON document.
Exit codes: 0; 1, a failed self-test or benchmark, or a pair that `certify` disproves; 2, a request
that cannot be met; 130, Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

import pydistill
from pydistill import _native, _registry
from pydistill.reference.cache_decode import CODES

_PACKAGES = ("torch", "triton", "numpy", "transformers", "flash-attn")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage that argparse prints before it."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except KeyboardInterrupt:
        print(f"\npydistill {options.command}: interrupted.", file=sys.stderr)
        return 130
    except _Problem as problem:
        print(f"pydistill {options.command}: {problem}", file=sys.stderr)
        return 2


class _Problem(Exception):
    """A request that cannot be met: one sentence for the user."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pydistill", description="Compiled operators for distillation.")
    parser.add_argument("--version", action="version", version=pydistill.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    operators = sorted(_registry.OPERATORS)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, group: Any = commands
    ) -> _Parser:
        sub: _Parser = group.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.set_defaults(run=run)
        return sub

    command(
        "env", _env, "Versions, native code, and which backend each operator uses here and why."
    )
    command("ops", _ops, "Operators, their kernels, kinds and backends.")
    selftest = command(
        "selftest", _selftest, "Checks every backend of this machine against the truth."
    )
    selftest.add_argument("op", nargs="?", choices=operators, help="one operator (all of them)")
    selftest.add_argument("--all", action="store_true", help="also the cases that take seconds")
    bench = command("bench", _bench, "Times operators against other implementations.")
    bench.add_argument("op", nargs="?", choices=operators, help="one operator (all of them)")
    bench.add_argument(
        "--quick", action="store_true", help="a check of the harness, no measurement"
    )
    demo = command("demo", _demo, "Distils a draft from a real model and reports what it gains.")
    demo.add_argument("--model", help="Hugging Face id or folder (SmolLM2-135M-Instruct)")
    demo.add_argument("--draft", default="feature:2+1", help="as of `draft` (feature:2+1)")
    demo.add_argument("--divergence", default="tvd", help="as of `draft` (tvd)")
    demo.add_argument("--steps", type=_positive, default=60, help="training steps (60)")
    demo.add_argument("--seed", type=int, default=0, help="(0)")
    demo.add_argument("--output", type=Path, metavar="FOLDER", help="save the draft there")
    text = "Writes on from a prompt by speculative decoding, and says what the draft gained."
    write = command("generate", _generate, text)
    write.add_argument("prompt", help="the user's message, where the model has a chat template")
    write.add_argument("--model", help="Hugging Face id or folder (SmolLM2-135M-Instruct)")
    write.add_argument(
        "--draft", default="ngram", help="ngram, none, layers:N of the model, or a model (ngram)"
    )
    write.add_argument(
        "--max-new-tokens", dest="new_tokens", type=_positive, default=128, help="(128)"
    )
    write.add_argument(
        "--num-draft-tokens", type=_drafted, default="auto", help="a number, or auto (auto)"
    )
    write.add_argument("--method", choices=("token", "block"), default="token", help="(token)")
    write.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    write.add_argument("--top-k", type=int, default=0, help="0 is off (0)")
    write.add_argument("--top-p", type=float, default=1.0, help="(1)")
    write.add_argument("--min-p", type=float, default=0.0, help="(0)")
    write.add_argument("--seed", type=int, default=0, help="(0)")
    write.add_argument(
        "--compare", action="store_true", help="also write it by transformers' own generate"
    )
    text = "Tests whether sampling with a draft leaves the model's distribution as it is."
    certify = command("certify", _certify, text)
    certify.add_argument("prompt", help="the user's message, where the model has a chat template")
    certify.add_argument("--model", help="Hugging Face id or folder (SmolLM2-135M-Instruct)")
    certify.add_argument(
        "--draft", default="ngram", help="ngram, none, layers:N of the model, or a model (ngram)"
    )
    certify.add_argument(
        "--num-draft-tokens", type=_drafted, default=3, help="a number, or auto (3)"
    )
    certify.add_argument(
        "--max-new-tokens", dest="new_tokens", type=_positive, help="(2 more than are drafted)"
    )
    certify.add_argument("--samples", type=_positive, default=2048, help="(2048)")
    certify.add_argument("--method", choices=("token", "block"), default="token", help="(token)")
    certify.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    certify.add_argument("--top-k", type=int, default=0, help="0 is off (0)")
    certify.add_argument("--top-p", type=float, default=1.0, help="(1)")
    certify.add_argument("--min-p", type=float, default=0.0, help="(0)")
    certify.add_argument(
        "--false-alarm", type=float, default=1e-4, help="chance that a right pair fails (0.0001)"
    )
    certify.add_argument("--confidence", type=float, default=0.99, help="of the bound (0.99)")
    certify.add_argument("--seed", type=int, default=0, help="(0)")
    text = "Trains a draft for a target (DistillSpec); resumes a run that was ended."
    draft = command("draft", _draft, text)
    draft.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="for the draft, new"
    )
    draft.add_argument("--model", help="Hugging Face id or folder (SmolLM2-135M-Instruct)")
    draft.add_argument(
        "--draft", nargs="+", default=["layers:6"],
        help="layers:N, layers:I,J,... of it, feature:N or M+N on its states, a model (layers:6)",
    )  # fmt: skip
    draft.add_argument("--width", type=_positive, help="of a feature draft (the target's)")
    draft.add_argument(
        "--draft-vocab", metavar="N|FILE", help="the draft's head: N frequent tokens, or ids (all)"
    )
    draft.add_argument("--divergence", nargs="+", default=["forward_kl"], help="(forward_kl)")
    draft.add_argument("--unroll", type=_positive, default=1, help="steps of a feature draft (1)")
    draft.add_argument("--source", nargs="+", default=["target"], help="target or text (target)")
    draft.add_argument("--on-policy", type=float, default=0.0, help="share of steps (0)")
    draft.add_argument("--signal", default="teacher", help="teacher or verify (teacher)")
    draft.add_argument("--teacher-cache", type=Path, metavar="FOLDER", help="its texts and rows")
    draft.add_argument("--text", type=Path, metavar="FILE", help="a document a line, or .jsonl")
    draft.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (the demo's)")
    draft.add_argument("--own-prompts", type=int, default=0, help="more, by the target (0)")
    draft.add_argument("--temperature", type=float, default=1.0, help="of serving (1)")
    draft.add_argument("--top-k", type=int, default=0, help="0 is off (0)")
    draft.add_argument("--top-p", type=float, default=1.0, help="(1)")
    draft.add_argument("--min-p", type=float, default=0.0, help="(0)")
    draft.add_argument("--steps", type=_positive, default=200, help="(200)")
    draft.add_argument("--batch", type=_positive, default=16, help="answers a step (16)")
    draft.add_argument("--answers", type=_positive, default=4, help="of the target, a prompt (4)")
    draft.add_argument("--length", type=_positive, default=64, help="tokens of an answer (64)")
    draft.add_argument("--row", type=_positive, default=256, help="tokens that are packed (256)")
    draft.add_argument("--sample-batch", type=_positive, default=64, help="answers at once (64)")
    draft.add_argument("--learning-rate", type=float, default=1e-3, help="(0.001)")
    draft.add_argument("--schedule", default="linear", help="linear, cosine, constant (linear)")
    draft.add_argument("--warmup", type=float, default=0.1, help="share of the steps (0.1)")
    draft.add_argument("--weight-decay", type=float, default=0.01, help="(0.01)")
    draft.add_argument(
        "--train-embeddings", action="store_true", help="also those that are no head"
    )
    draft.add_argument("--data", type=Path, metavar="FOLDER", help="of the target's answers")
    draft.add_argument("--num-draft-tokens", type=_positive, default=4, help="when judged (4)")
    draft.add_argument("--checkpoint-every", type=_positive, default=50, help="steps (50)")
    draft.add_argument("--seed", type=int, default=0, help="(0)")
    draft.add_argument(
        "--compare", action="store_true", help="one training for each draft, divergence, source"
    )
    draft.add_argument(
        "--short-steps", type=_positive, help="of each of these; then --steps of the first"
    )
    text = "Teacher caches: top-k log-probabilities, recorded once for many students."
    cache = commands.add_parser("cache", help=text, description=text)
    parts = cache.add_subparsers(dest="part", required=True, metavar="COMMAND")
    text = "Runs a teacher over texts and records its top-k; resumes an unfinished cache."
    build = command("build", _cache_build, text, parts)
    build.add_argument("output", type=Path, metavar="folder", help="of the new or unfinished cache")
    build.add_argument("--model", help="Hugging Face id or folder (SmolLM2-135M-Instruct)")
    build.add_argument("--text", type=Path, metavar="FILE", help="a document a line, or .jsonl")
    build.add_argument("--k", type=_positive, default=64, help="tokens kept a position (64)")
    build.add_argument("--temperature", type=float, default=1.0, help="of the teacher (1)")
    build.add_argument("--codes", choices=sorted(CODES), default="uint8", help="(uint8)")
    build.add_argument("--length", type=_positive, default=1024, help="tokens a document (1024)")
    text = "What a cache holds, its bytes a token, and its divergence against K."
    info = command("info", _cache_info, text, parts)
    info.add_argument("folder", type=Path)
    verify = command("verify", _cache_verify, "Compares every checksum of a cache.", parts)
    verify.add_argument("folder", type=Path)
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _drafted(text: str) -> int | str:
    return text if text == "auto" else 0 if text == "0" else _positive(text)


def _print_json(data: object) -> None:
    """JSON has no NaN and no infinity: they become null."""
    text = json.dumps(data, default=str)
    print(json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2))


def environment() -> dict[str, Any]:
    """What `pydistill env` reports."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "pydistill": pydistill.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "native": {
            "available": _native.available(),
            "reason": _native.reason(),
            "capability": _native.capability(),
            "supported": _native.supported_capabilities(),
        },
        "cuda": {
            "devices": [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ],
            "library": _native.cuda_available(),
            "reason": _native.cuda_reason(),
        },
        "operators": {
            name: {
                device: {"backend": choice.backend, "reason": choice.reason}
                for device in devices
                for choice in [_registry.explain(op, device)]
            }
            for name, op in _registry.public().items()
        },
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _env(options: argparse.Namespace) -> int:
    found = environment()
    if options.json:
        _print_json(found)
        return 0
    native, cuda = found["native"], found["cuda"]
    packages = ", ".join(f"{k} {v or 'absent'}" for k, v in found["packages"].items())
    if native["available"]:
        state = f"loaded, {native['capability']} of {', '.join(native['supported'])}"
    else:
        state = f"absent: {native['reason']}"
    print(f"pydistill    {found['pydistill']}, Python {found['python']}, {found['platform']}")
    print(f"packages     {packages}")
    print(f"threads      {found['threads']}")
    print(f"CPU kernels  {state}")
    print(f"CUDA devices {', '.join(cuda['devices']) or 'none'}")
    print(f"CUDA kernels {'loaded' if cuda['library'] else 'absent: ' + cuda['reason']}")
    print("\nimpl='auto' uses")
    for name, choices in found["operators"].items():
        for device, choice in choices.items():
            print(f"  {name} on {device}: {choice['backend']} ({choice['reason']})")
    return 0


def _ops(options: argparse.Namespace) -> int:
    found = {
        name: {
            "kernels": list(op.kernels),
            "kinds": list(op.kinds),
            "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in op.dtypes),
            "backends": [b for b in _registry.BACKENDS if _registry.has_kernel(op.kernels[0], b)],
        }
        for name, op in _registry.public().items()
    }
    if options.json:
        _print_json(found)
        return 0
    for name, parts in found.items():
        print(name)
        for part, values in parts.items():
            if values:
                print(f"  {part:9} {', '.join(values)}")
    return 0


def _selftest(options: argparse.Namespace) -> int:
    from pydistill.testing import selftest

    groups = []
    for group in selftest.groups(_chosen(options), heavy=options.all):
        groups.append(group)
        if not options.json:
            state = "ok" if not group.failures else f"{len(group.failures)} FAILED"
            print(
                f"{group.op:12} {group.device:5} {group.backend:10} {group.kind:16}"
                f" {group.cases:4} cases, worst error {group.worst:8.2g} of the allowed: {state}"
            )
            for failure in group.failures:
                print(f"    {failure}")
            sys.stdout.flush()
    cases = sum(group.cases for group in groups)
    failed = sum(len(group.failures) for group in groups)
    if options.json:
        _print_json({"cases": cases, "failed": failed, "groups": [vars(g) for g in groups]})
    else:
        print(f"{cases} cases, {failed} failed" if failed else f"{cases} cases, all right")
    return 1 if failed else 0


def _chosen(options: argparse.Namespace) -> list[str]:
    return [options.op] if options.op else sorted(_registry.OPERATORS)


def _bench(options: argparse.Namespace) -> int:
    root = Path(pydistill.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise _Problem(
            "the benchmarks are not part of the installed package; run `make bench` in a checkout"
            " of pydistill's source."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, "-m", "benchmarks", *([options.op] if options.op else [])]
        command += ["--quick"] if options.quick else []
        command += ["--json", str(path)] if options.json else []
        # With --json the tables go where the progress goes.
        done = subprocess.run(command, cwd=root, stdout=sys.stderr if options.json else None)
        if options.json and path.is_file():
            print(path.read_text())
    return 1 if done.returncode else 0


def _run(name: str, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Runs the recipe `name`: its module, the fields of its Options that the command line has, and
    the result."""
    from pydistill.recipes import UsageError

    try:
        recipe, chosen = _options(name, options)
        return recipe, chosen, recipe.run(chosen, progress=not options.json)
    except UsageError as error:
        raise _Problem(str(error)) from error


def _options(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    from pydistill.recipes import models

    recipe = importlib.import_module(f"pydistill.recipes.{name}")
    asked = vars(options) | {"model": options.model or models.DEFAULT}
    return recipe, recipe.Options(
        **{x.name: asked[x.name] for x in fields(recipe.Options) if x.name in asked}
    )


def _demo(options: argparse.Namespace) -> int:
    demo, _, result = _run("demo", options)
    if options.json:
        _print_json(result.to_json())
    else:
        print(demo.table(result))
    return 0


def _generate(options: argparse.Namespace) -> int:
    write, chosen, result = _run("write", options)
    if options.json:
        _print_json(result.to_json())
    else:
        print(write.table(result, chosen))
    return 0


def _certify(options: argparse.Namespace) -> int:
    certify_pair, _, found = _run("certify_pair", options)
    if options.json:
        _print_json(certify_pair.to_json(found))
    else:
        print(certify_pair.table(found))
    return 0 if found.lossless else 1


def _draft(options: argparse.Namespace) -> int:
    lists = {name: getattr(options, name) for name in ("draft", "divergence", "source")}
    for name, values in lists.items():
        if len(values) > 1 and not options.compare:
            raise _Problem(f"--{name} has {len(values)} values; pass one, or add --compare.")
        setattr(options, name, values[0])
    if options.short_steps is not None and not options.compare:
        raise _Problem(f"--short-steps {options.short_steps} is of a comparison; add --compare.")
    try:
        run = _draft_compare if options.compare else _draft_one
        result, text = run(options, lists)
    except KeyboardInterrupt:
        print(f"\n{options.output} is not done; the same command goes on.", file=sys.stderr)
        raise
    if os.environ.get("RANK", "0") != "0":
        return 0
    if options.json:
        _print_json(result.to_json())
    else:
        print(text)
    return 0


def _draft_one(options: argparse.Namespace, _: dict[str, list[str]]) -> tuple[Any, str]:
    draft, _, result = _run("draft", options)
    return result, draft.table(result)


def _draft_compare(options: argparse.Namespace, lists: dict[str, list[str]]) -> tuple[Any, str]:
    from pydistill.recipes import UsageError

    try:
        from pydistill.recipes import draft_compare

        base = _options("draft", options)[1]
        drafts, divergences, sources = lists.values()
        result = draft_compare.run(
            base, drafts, divergences, sources, not options.json, options.short_steps
        )
    except UsageError as error:
        raise _Problem(str(error)) from error
    return result, draft_compare.table(result)


def _cache_build(options: argparse.Namespace) -> int:
    try:
        build_cache, _, result = _run("build_cache", options)
    except KeyboardInterrupt:
        if options.output.exists():
            print(f"\n{options.output} is kept; the same command resumes it.", file=sys.stderr)
        raise
    if options.json:
        _print_json(vars(result))
    else:
        print(build_cache.table(result))
    return 0


def _cache_info(options: argparse.Namespace) -> int:
    from pydistill.cache import CacheError, TeacherCache, truncation

    try:
        cache = TeacherCache.open(options.folder, tokenizer=None, partial=True)
        lost = truncation(cache)
    except CacheError as error:
        raise _Problem(str(error)) from error
    mean, most = cache.stored_kl()
    found = {
        **{name: value for name, value in vars(cache.manifest).items() if name != "tokens"},
        "complete": cache.manifest.tokens is not None,
        "tokens": len(cache),
        "documents": len(cache.documents) - 1,
        "bytes_a_token": cache.disk_bytes() / max(1, len(cache)),
        "stored_kl_mean": mean,
        "stored_kl_max": most,
    }
    if options.json:
        _print_json({**found, "truncation": [row._asdict() for row in lost]})
        return 0
    for name, value in found.items():
        print(f"{name:14} {value:.6g}" if isinstance(value, float) else f"{name:14} {value}")
    print("\n   K   mass outside   KL(renormalized top K || teacher), nats a token")
    for row in lost:
        print(f"{row.k:4}   {row.tail_mass:12.4%}   {row.renormalized_kl:.5f}")
    return 0


def _cache_verify(options: argparse.Namespace) -> int:
    from pydistill.cache import CacheError, TeacherCache

    try:
        cache = TeacherCache.open(options.folder, tokenizer=None, partial=True)
        cache.verify()
    except CacheError as error:
        if options.json:
            _print_json({"ok": False, "problem": str(error)})
        else:
            print(error)
        return 1
    complete = cache.manifest.tokens is not None
    if options.json:
        _print_json({"ok": True, "tokens": len(cache), "complete": complete})
    else:
        print(f"{len(cache)} tokens{'' if complete else ', unfinished'}, every checksum right")
    return 0
