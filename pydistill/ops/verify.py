"""Verification of a speculative draft: how many drafted tokens the target accepts, and the token
that follows them, from the logits of both.

    token   accept x while u q(x) < p(x); then y ~ [p - q]+, or y ~ p after the last
    block   accept the longest prefix that its own coin passes, by the ratio of the whole prefix
    tree    try the siblings of a tree one by one, p and q being what the earlier ones left
    traversal   the same from the leaves up, by the ratio of the whole path

p and q are the warped distributions (temperature, top-k, top-p, min-p), u counter-based coins.
docs/ops/verify.md has every formula, the coins bit by bit, and the limits.

Shapes: target_logits [B, K + 1, V], draft_logits [B, K, V], or [B, K, S] of a draft that is known
on the S tokens of draft_topk_ids [B, K, S] or [S], draft_ids [B, K], tree [B, K]; fp32,
bf16 or fp16 (fp64 on the reference), masses summed in fp64. Cost: one read of the rows that are
needed and one pass over them in cache; nothing of size V is written. One call decides and samples,
so that no probabilities are ever in memory and the reported numbers are those the decision was made
with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _registry
from pydistill.ops import _memory, _rows, _verify_call
from pydistill.reference import divergence
from pydistill.reference.verify import (
    BAD_DRAFT,
    BAD_ID,
    BAD_PARENT,
    BAD_TARGET,
    IMPOSSIBLE,
    TREES,
    Inputs,
    Outputs,
    Rule,
    gradient_rows,
    verify_reference,
)

__all__ = [
    "BAD_DRAFT",
    "BAD_ID",
    "BAD_PARENT",
    "BAD_TARGET",
    "IMPOSSIBLE",
    "VerifyGradient",
    "VerifyResult",
    "verify",
    "verify_with_gradient",
]
OP = _registry.operator(
    "verify",
    {torch.float32, torch.bfloat16, torch.float16},
    lacks={"triton": (*TREES, "verify_with_gradient"), "cuda": ("verify_with_gradient",)},
)


class VerifyResult(NamedTuple):
    """What `verify` returns. fp32, or fp64 for fp64 logits, but for the integers."""

    tokens: Tensor  # int64 [B, K + 1], -1 behind the last
    num_accepted: Tensor  # int64 [B]
    logprobs: Tensor  # [B, K + 1]
    overlap: Tensor  # [B, K]
    bias: Tensor  # [B, K]
    target_lse: Tensor  # [B, K + 1]
    draft_lse: Tensor  # [B, K]
    flags: Tensor  # int32 [B, K + 1]
    path: Tensor  # int64 [B, K], -1 behind the last


def verify(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_ids: Tensor,
    *,
    draft_topk_ids: Tensor | None = None,
    method: str = "token",
    tree: Tensor | None = None,
    num_drafted: int | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    draft_temperature: float | Tensor | None = None,
    draft_top_k: int | Tensor | None = None,
    draft_top_p: float | Tensor | None = None,
    draft_min_p: float | Tensor | None = None,
    logit_bias: Tensor | None = None,
    lenience: tuple[str, float] | None = None,
    tv_budget: float | None = None,
    typical: tuple[float, float] | None = None,
    seed: int | Tensor,
    position: int | Tensor,
    impl: str = "auto",
) -> VerifyResult:
    """Accepts a prefix of each request's drafted tokens, or a path of its tree of them, and samples
    the token that follows.

    Args:
        target_logits: `[B, K + 1, V]`, any strides: row i is the target's of the token at offset i;
            in a tree row 0 is at the root, row i + 1 behind node i. fp32, bf16, fp16; fp64 on the
            reference.
        draft_logits: `[B, K, V]` of the same dtype: the rows that the drafted tokens were sampled
            from, by the draft's warpers, at the places of the target's rows; or None for a draft
            that does not sample (greedy, n-gram, the most likely tokens).
            Or `[B, K, S]`, logits or log-probabilities on the tokens of `draft_topk_ids`; a drafted
            token outside of these ends the block, as if it had not been drafted.
        draft_topk_ids: int64 or int32 `[B, K, S]`, or `[S]` if all rows have the same: the tokens
            of `draft_logits`, in any order, each at most once a row; a negative id marks an empty
            slot, whose logit is not read.
        draft_ids: int64 or int32 `[B, K]`, -1 in slots without a token.
        method: for chains "token" or "block", which leave the target's law as it is, or "typical";
            for trees "tree" or "traversal", and "tree_target_only", which asks no draft. These
            three leave the law as it is.
        tree: int32 or int64 `[K]`, or `[B, K]` for one a request: the node that each drafted token
            follows, -1 for the committed tokens. Parents come before their children, siblings in
            the order in which they were drawn, without replacement.
        num_drafted: slots from here on are not looked at; an int or one a request, 0 to K (all K).
        temperature, top_k, top_p, min_p: the target's warpers, a number or one a request, applied
            in this order; temperature 0 is greedy, and `top_k` 0, `top_p` 1 and `min_p` 0 are off.
        draft_temperature, draft_top_k, draft_top_p, draft_min_p: the draft's; None: the target's.
        logit_bias: `[V]` or `[B, V]`, added to the target's logits before anything else.
        lenience: for "token", ("linear", e), ("square", e), ("exponential", e) or ("ensemble", w).
        tv_budget: for "token", the total variation that may be spent at each position, 0 to 1.
        typical: for "typical", (epsilon, alpha); (0.3, 0.09).
        seed: an int or one a request.
        position: tokens committed when the block starts, an int or one a request. Never repeats
            for a seed: a repeated position repeats its coins.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.

    Returns:
        VerifyResult:
            tokens: the accepted tokens and one more, then -1.
            num_accepted: how many of them were drafted.
            logprobs: log-probabilities of the emitted tokens under the target's warped rows.
            overlap: sum min(p, q), the probability that "token" accepts.
            bias: total variation of the emitted token's law from p; 0 for lossless methods.
            target_lse, draft_lse: log-normalisers of the warped rows.
            flags: of each row, the sum of BAD_ID (1), BAD_TARGET (2), BAD_DRAFT (4), IMPOSSIBLE (8)
                and BAD_PARENT (16): what ended the drafted block before its rejection or its end,
                and in a tree, which children could not be put to the test.
            path: the accepted slots, or nodes, then -1: of whose caches to keep.

        Numbers of rows that were not evaluated are NaN. No result requires grad.

    Raises:
        ValueError, TypeError: for an argument that cannot be right, and for what is not built; the
            message names the value and the fix. Where values cannot be read for free (under
            compile, on a GPU) an id out of range ends the block and raises its flag.
        RuntimeError: the logits carry a forward-mode tangent, which would be lost; detach them
            outside the transform.
    """
    rule = _verify_call.rule_of(method, tree, lenience, tv_budget, typical)
    compiling = torch.compiler.is_compiling()
    key = None
    if not compiling and draft_topk_ids is None and tree is None and logit_bias is None:
        settings = (
            num_drafted, temperature, top_k, top_p, min_p,
            draft_temperature, draft_top_k, draft_top_p, draft_min_p, impl,
        )  # fmt: skip
        key = _verify_call.key_of(rule, target_logits, draft_logits, draft_ids, seed, settings)
        known = _verify_call.known_call(key, target_logits, draft_logits, draft_ids, seed, position)
        if known is not None:
            try:
                return VerifyResult(*_registry.eager("verify_eager")(*known))
            except RuntimeError:
                pass  # what follows says what is wrong
    warpers = (temperature, top_k, top_p, min_p)
    drafts = (draft_temperature, draft_top_k, draft_top_p, draft_min_p)

    def prepare(explain: bool) -> _verify_call.Call:
        return _verify_call.prepare(
            OP.name, target_logits, draft_logits, draft_ids, rule, impl, explain,
            draft_topk_ids=draft_topk_ids, tree=tree, num_drafted=num_drafted, warpers=warpers,
            drafts=drafts, logit_bias=logit_bias, seed=seed, position=position,
        )  # fmt: skip

    dual = forward_ad._current_level >= 0
    if dual and compiling:
        raise RuntimeError(_NO_TANGENT)
    if dual or (not compiling and torch._C._functorch.peek_interpreter_stack() is not None):
        call = prepare(True)
        return VerifyResult(*_Verify.apply(*call.inputs, rule, call.backend))
    call = prepare(False)
    inputs = call.inputs
    if any(x is not None and x.requires_grad for x in inputs):
        inputs = Inputs._make(x if x is None else x.detach() for x in inputs)
    try:
        found = VerifyResult(*_forward(inputs, rule, call.backend, call.check))
    except RuntimeError:
        if call.check:
            prepare(True)  # names the value
        raise
    if key is not None and call.check and _registry.has_eager():
        _verify_call.remember(key, call, target_logits, draft_logits, draft_ids)
    return found


class VerifyGradient(NamedTuple):
    """What `verify_with_gradient` returns."""

    result: VerifyResult
    divergence: Tensor  # [B, K], NaN in rows that were not evaluated
    gradient: Tensor  # [B, K, V], of the draft's dtype; 0 in rows that were not evaluated


_KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")


def verify_with_gradient(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_ids: Tensor,
    kind: str = "forward_kl",
    *,
    beta: float | None = None,
    overwrite_logits: bool = False,
    **arguments: Any,
) -> VerifyGradient:
    """`verify`, and of every row that it evaluated the divergence of the draft from the target,
    with its gradient: serving gives the distillation signal where the draft was tried.

        divergence = D(p, q)        p and q the warped distributions that the tokens were tried by
        gradient   = q (h - sum q h) / draft_temperature,   h = dD/dq, what the filters keep given

    Args:
        target_logits, draft_logits, draft_ids, arguments: as in `verify`; draft_logits dense, so
            not `draft_topk_ids`.
        kind: "forward_kl", "reverse_kl", "jsd" or "tvd", as in `pydistill.divergence`. Where a
            filter cuts what the other side keeps, the two KLs are infinite; "tvd", which is 1 -
            `overlap`, and "jsd" are not.
        beta: of `jsd`, in (0, 1); None is 0.5.
        overwrite_logits: writes the gradient over `draft_logits` (no gradient memory); the logits
            are lost, and `gradient` is `draft_logits`. For eager mode.

    Returns:
        VerifyGradient: `result`, as of `verify`; `divergence [B, K]`, fp32, or fp64 for fp64
        logits; `gradient [B, K, V]` in the draft's dtype, of each divergence by its own row: weigh
        rows and pass it to `draft_logits.backward(gradient)`. By rows as `overlap` is. In rows that
        were not evaluated, and in greedy requests, the divergence is NaN and the gradient 0. In
        rows flagged BAD_TARGET or BAD_DRAFT both are NaN. An infinite divergence has a NaN
        gradient, but for forward_kl.

    Raises:
        ValueError, TypeError, RuntimeError: as `verify`; the message names the value and the fix.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(_KINDS)}.")
    if beta is not None and kind != "jsd":
        raise ValueError(f"beta={beta!r} belongs to kind='jsd', not {kind!r}; drop it.")
    if beta is not None:
        if isinstance(beta, bool) or not isinstance(beta, (int, float)):
            raise TypeError(f"beta is a {type(beta).__name__}; pass a number between 0 and 1.")
        _rows.check_range("beta", beta, 0.0, 1.0)
    if draft_logits is None or arguments.get("draft_topk_ids") is not None:
        what = "None" if draft_logits is None else "known on the tokens of draft_topk_ids"
        raise ValueError(
            f"draft_logits is {what}, and the gradient is that of whole rows; pass [B, K, V], or"
            " call verify."
        )
    result = verify(target_logits, draft_logits, draft_ids, **arguments)
    target, draft = target_logits.detach(), draft_logits.detach()
    batch, device = target.shape[0], target.device
    ours, theirs = (
        tuple(arguments.get(side + name) for name in _verify_call.NAMES) for side in ("", "draft_")
    )
    bias = arguments.get("logit_bias")
    inputs = (
        _verify_call.unit_stride(target),
        _verify_call.unit_stride(draft),
        _verify_call.warper_rows(ours, theirs, batch, device, False),
        None if bias is None else _verify_call.bias_rows(bias, target),
        result.overlap,
        result.flags,
    )
    backend = _verify_call.backend_of(
        OP.name, arguments.get("impl", "auto"), device.type, target.dtype, "verify_with_gradient"
    )
    options = (divergence.KINDS[kind].id, 0.5 if beta is None else float(beta))
    if overwrite_logits:
        _check_overwrite(target_logits, draft_logits)
        found = _overwrite(inputs, options, backend)
        torch.autograd.graph.increment_version(draft_logits)
        return VerifyGradient(result, found, draft_logits)
    if backend == "reference" and torch.compiler.is_compiling():
        raise RuntimeError(
            "verify_with_gradient on the reference derives as it runs, which torch.compile cannot"
            " trace; call it outside of compiled code, or use another impl."
        )
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        and not torch.compiler.is_compiling()
    ):
        return VerifyGradient(result, *_Gradient.apply(*inputs, options, backend))
    return VerifyGradient(result, *_gradient(inputs, options, backend))


_NO_TANGENT = (
    "pydistill.verify has no derivatives, and the logits' tangent would be lost; call it outside"
    " the forward-mode transform."
)


def _forward(inputs: Inputs, rule: Rule, backend: str, check: bool = False) -> Outputs:
    target = inputs.target
    if backend == "reference":
        dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
        found = verify_reference(inputs, rule)
        return Outputs(*(x.to(dtype) if x.is_floating_point() else x for x in found))
    if check and _registry.has_eager() and not torch._C._len_torch_dispatch_stack():
        return Outputs(*_registry.eager("verify_eager")(*inputs, *rule, check))
    batch, slots = inputs.ids.shape
    device, rows, drafted = target.device, (batch, slots + 1), (batch, slots)
    whole, single = torch.int64, torch.float32
    outputs = Outputs(
        torch.empty(rows, dtype=whole, device=device),
        torch.empty(batch, dtype=whole, device=device),
        torch.empty(rows, dtype=single, device=device),
        torch.empty(drafted, dtype=single, device=device),
        torch.empty(drafted, dtype=single, device=device),
        torch.empty(rows, dtype=single, device=device),
        torch.empty(drafted, dtype=single, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(drafted, dtype=whole, device=device),
    )
    _registry.overload("verify_fwd", backend)(*inputs, *rule, check, *outputs)
    return outputs


def verify_fwd(*args: Any) -> None:
    """The reference as an `out` kernel, for torch's dispatcher."""
    inputs, rule, outputs = Inputs(*args[:10]), Rule(*args[10:14]), args[15:]
    for out, value in zip(outputs, verify_reference(inputs, rule), strict=True):
        out.copy_(value)


_ARGUMENTS = (
    "Tensor target, Tensor? draft, Tensor ids, Tensor num_drafted, Tensor warpers, Tensor seed,"
    " Tensor position, Tensor? logit_bias, Tensor? parent, Tensor? support, int method,"
    " int lenience, float strength, float alpha, bool check"
)
_registry.eager_kernel("verify_eager", f"({_ARGUMENTS}) -> ({', '.join(['Tensor'] * 9)})")
_registry.kernel(
    OP,
    "verify_fwd",
    f"({_ARGUMENTS},"
    " Tensor(a!) tokens, Tensor(b!) num_accepted, Tensor(c!) logprobs, Tensor(d!) overlap,"
    " Tensor(e!) bias, Tensor(f!) target_lse, Tensor(g!) draft_lse, Tensor(h!) flags,"
    " Tensor(i!) path) -> ()",
    verify_fwd,
)


_Tensors = tuple[Any, ...]  # target, draft, warpers, logit_bias, overlap, flags


def _check_overwrite(target: Tensor, draft: Tensor) -> None:
    if torch.compiler.is_compiling() or not _rows.values_readable(draft):
        raise RuntimeError(
            "overwrite_logits=True is for eager calls on the CPU, outside of transforms; pass"
            " overwrite_logits=False."
        )
    repeats = any(s == 0 and n > 1 for s, n in zip(draft.stride(), draft.shape, strict=True))
    if repeats or _verify_call.unit_stride(draft) is not draft:
        raise ValueError(
            "overwrite_logits=True needs rows with unit last stride and memory of their own, not"
            f" strides {draft.stride()}; pass draft_logits.contiguous()."
        )
    if draft.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
        raise ValueError(
            "overwrite_logits=True would write over target_logits, which shares memory with"
            " draft_logits; pass draft_logits.clone()."
        )


def _gradient(inputs: _Tensors, options: tuple[int, float], backend: str) -> tuple[Tensor, Tensor]:
    draft = inputs[1]
    if backend == "reference":
        found, gradient = _gradient_reference(inputs, options)
        return found.to(inputs[4].dtype), gradient.to(draft.dtype)
    found, gradient = torch.empty_like(inputs[4]), _memory.empty_like(draft)
    _registry.overload("verify_gradient", backend)(*inputs, *options, found, gradient)
    return found, gradient


def _overwrite(inputs: _Tensors, options: tuple[int, float], backend: str) -> Tensor:
    if backend == "reference":
        found, gradient = _gradient(inputs, options, backend)
        inputs[1].copy_(gradient)
        return found
    found = torch.empty_like(inputs[4])
    _registry.overload("verify_gradient_overwrite", backend)(*inputs, *options, found)
    return found


def _gradient_reference(inputs: _Tensors, options: tuple[int, float]) -> tuple[Tensor, Tensor]:
    """Divergences and gradients in fp64: `divergence_reference`, derived by autograd."""
    kind, beta = options
    rows = gradient_rows(*inputs)
    shape, counted = rows.student.shape, rows.counted.reshape(-1)
    params = rows.student.new_full((*shape[:2], 3), beta)
    params[..., 0] = rows.temperature[:, None]
    with _registry.autograd_inside_op():
        leaf = rows.student.reshape(-1, shape[-1]).detach().requires_grad_()
        pairs = divergence.Inputs(
            leaf, rows.teacher.reshape(leaf.shape), None, None, counted, None,
            params.reshape(-1, 3),
        )  # fmt: skip
        scalars = divergence.Options(kind, 1.0, beta, beta, False, 0.0, 0.0, shape[-1])
        loss, _ = divergence.divergence_reference(pairs, scalars)
        (gradient,) = torch.autograd.grad(loss, leaf, counted.to(loss.dtype))
    found = torch.where(rows.counted, loss.detach().reshape(shape[:2]), torch.nan)
    return found, torch.where(rows.wrong[..., None], torch.nan, gradient.reshape(shape))


def verify_gradient(*args: Any) -> None:
    """The reference as an `out` kernel."""
    for out, value in zip(args[8:], _gradient_reference(args[:6], args[6:8]), strict=True):
        out.copy_(value)


def verify_gradient_overwrite(*args: Any) -> None:
    verify_gradient(*args, args[1])


_PAIRS = "Tensor warpers, Tensor? logit_bias, Tensor overlap, Tensor flags, int kind, float beta"
_registry.kernel(
    OP,
    "verify_gradient",
    f"(Tensor target, Tensor draft, {_PAIRS}, Tensor(a!) divergence, Tensor(b!) gradient) -> ()",
    verify_gradient,
)
_registry.kernel(
    OP,
    "verify_gradient_overwrite",
    f"(Tensor target, Tensor(a!) draft, {_PAIRS}, Tensor(b!) divergence) -> ()",
    verify_gradient_overwrite,
)


class _NoDerivatives(torch.autograd.Function):
    """Under transforms. Not differentiable: a gradient is none, a tangent an error."""

    @staticmethod
    def setup_context(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        count: int = ctx.count
        return (None,) * count

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise RuntimeError(_NO_TANGENT)


def _row_a_request(x: Tensor, dim: int | None, batch: int, requests: int) -> Tensor:
    """A tensor with a row for all requests of each call of a vmapped batch: one a request of it."""
    x = x[None] if dim is None else x.movedim(dim, 0)
    return x.expand(batch, requests, *x.shape[2:]).reshape(-1, *x.shape[2:])


class _Gradient(_NoDerivatives):
    """`_gradient` under transforms; `verify` has refused tangents before."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _gradient(args[:6], *args[6:])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        batch, merged = info.batch_size, []
        requests = args[0].shape[1 if in_dims[0] == 0 else 0]
        for i, (x, dim) in enumerate(zip(args[:6], in_dims, strict=False)):
            if x is not None and i in (2, 3):  # warpers, logit_bias
                x = _row_a_request(x, dim, batch, requests).contiguous()
            elif x is not None:
                x = _rows.lead(x, dim, batch).contiguous()
            merged.append(x)
        found = _Gradient.apply(*merged, *args[6:])
        return tuple(x.reshape(batch, -1, *x.shape[1:]) for x in found), (0, 0)


class _Verify(_NoDerivatives):
    """`_forward` under transforms."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(_forward(Inputs(*args[:10]), *args[10:]))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        given, batch = Inputs(*args[:10]), info.batch_size
        requests = given.target.shape[1 if in_dims[0] == 0 else 0]
        merged: list[Tensor | None] = []
        for name, x, dim in zip(Inputs._fields, given, in_dims, strict=False):
            if x is None:
                merged.append(None)
            elif name in ("target", "draft"):
                merged.append(_verify_call.unit_stride(_rows.lead(x, dim, batch)))
            elif name == "ids":
                merged.append(_rows.lead(x, dim, batch).contiguous())
            else:
                merged.append(_row_a_request(x, dim, batch, requests).contiguous())
        found = _Verify.apply(*merged, *args[10:])
        return tuple(x.reshape(batch, -1, *x.shape[1:]) for x in found), (0,) * 9
