"""The cases of `pydistill.divergence`.

`run` gives, for one case and backend, the loss, the gradient under a random upstream (one number a
row where the reduction leaves rows), the tangent along a random direction, the row statistics and,
where the case allows it, the gradient of `overwrite_logits`. `truth` is the reference in fp64 on
the same, already rounded, numbers.

The gradient's size in a row is its largest element plus that of k t2 q, since a gradient is a
difference of terms the size of k t2 q and cancels where the rows are close. tvd's gradient hangs on
the sign of p - q: where the two are within 1e-5 of each other but not equal, either sign is right.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from pydistill.ops.divergence import divergence, divergence_jvp, divergence_with_stats
from pydistill.reference.divergence import KINDS
from pydistill.testing.case import Case, Expected, Tolerance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
_SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
_RANGES = {"temperature": (0.5, 3.0), "weight": (0.0, 2.0)}
_FLOPS_A_TOKEN = {"forward": 14, "backward": 10, "overwrite": 22}  # an exp or a log counts as one

# rtol holds for D itself; atol is what a sum over tokens may lose where D is close to 0.
TOLERANCES = {
    "loss": Tolerance(1e-5, 1e-6),
    "grad": Tolerance(1e-5, 1e-5),
    "tangent": Tolerance(1e-5, 1e-5),
    "stats": Tolerance(1e-5, 1e-5),
}


def _logits(
    pattern: str, rows: int, v_s: int, v_t: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """fp32 student [rows, v_s] and teacher [rows, v_t] of a named pattern."""
    s, t = 2 * torch.randn(rows, v_s, generator=g), 2 * torch.randn(rows, v_t, generator=g)
    steps = torch.randint(-16, 17, (rows, v_s), generator=g) / 8  # exact in every dtype used
    v = min(v_s, v_t)
    if pattern == "identical":
        t = s.clone()
    elif pattern == "near_equal":  # KL from about 2e-8 to 1e-2
        t = s + torch.logspace(-3.7, -0.9, rows)[:, None] * torch.randn(rows, v_s, generator=g)
    elif pattern == "offset":  # differences of logits are exact, so nothing is lost before the sums
        t = torch.round(s * 256) / 256 + 50 + steps / 64
        s = torch.round(s * 256) / 256
    elif pattern == "one_hot":
        s, t = torch.zeros(rows, v_s), torch.zeros(rows, v_t)
        row = torch.arange(rows)
        s[row, (3 * row) % v], t[row, (3 * row + row % 2) % v] = 60.0, 60.0
    elif pattern == "extreme":
        s = steps + 1e4 * torch.randint(-1, 2, (rows, v_s), generator=g)
        t = torch.flip(steps, (1,)) + 1e4 * torch.randint(-1, 2, (rows, v_t), generator=g)
        s[0], t[0] = steps[0] + 1e4, torch.flip(steps, (1,))[0] - 1e4
    elif pattern == "ties":
        s, t = torch.round(s / 2), torch.round(t / 2)
    elif pattern == "equal_mass":  # p == q exactly where both have support
        s, t = torch.zeros(rows, v_s), torch.zeros(rows, v_t)
        s[:, : v // 3], t[:, -(v // 3) :] = -torch.inf, -torch.inf
    elif pattern == "infinite":
        t[:, -3:], s[:, -3:] = -torch.inf, -torch.inf  # a padded vocabulary
        s[1, 2], t[2, 4] = -torch.inf, -torch.inf
        s[3, :5], t[3, 3:9] = -torch.inf, -torch.inf
        s[4, 1:], t[4, 1:] = -torch.inf, -torch.inf
        s[5, 1:], t[5, :-4] = -torch.inf, -torch.inf
    elif pattern == "poisoned":  # the first and last rows must not notice
        s[1, 3], t[2, 5], s[3, 0], t[4, -1] = torch.nan, torch.nan, torch.inf, torch.inf
        s[5], t[6] = -torch.inf, -torch.inf
        s[7], t[7] = -torch.inf, -torch.inf
    elif pattern != "normal":
        raise ValueError(f"pattern={pattern!r} is not known.")
    return s, t


def _lay(x: Tensor, layout: str) -> Tensor:
    """`x [rows, V]` in memory as `layout` says; what lies between the rows is NaN."""
    rows, v = x.shape
    if layout == "contiguous":
        return x
    if layout == "batched":
        return x.reshape(2, rows // 2, v)
    if layout == "permuted":  # [sequence, batch, V] seen as [batch, sequence, V]
        return x.reshape(2, rows // 2, v).transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(rows, v)
    if layout == "unaligned":
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(rows, v)
    if layout == "padded":
        return torch.cat([x, x.new_full((rows, 7), torch.nan)], dim=1)[:, :v]
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=1)[:, 0]
    raise ValueError(f"layout={layout!r} is not known.")


def _case(
    name: str,
    rows: int,
    v_s: int,
    kind: str = "forward_kl",
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    teacher: int | None = None,
    pattern: str = "normal",
    layout: str = "contiguous",
    teacher_layout: str | None = None,
    per_row: tuple[str, ...] = (),
    index: str | None = None,
    masked: str | None = None,
    labelled: bool = False,
    marks: tuple[str, ...] = (),
    tolerances: dict[str, Tolerance] | None = None,
    gate: Case | None = None,
    **options: Any,
) -> Case:
    v_t = teacher or v_s
    options = {"kind": kind, "reduction": "none", **options}
    dtype_name = "-".join(dict.fromkeys(_SHORT[d] for d in dtypes))
    case_id = f"{kind}-{name}-{dtype_name}-{rows}x{v_s}"
    pairs = rows + 5 if index else rows

    def inputs(device: torch.device | str, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + zlib.crc32(case_id.encode()))
        s, t = _logits(pattern, rows, v_s, v_t, g)
        kwargs: dict[str, Any] = dict(options)
        kwargs["student_logits"] = _lay(s.to(dtypes[0]).to(device), layout)
        kwargs["teacher_logits"] = _lay(t.to(dtypes[1]).to(device), teacher_layout or layout)
        shape = (pairs,) if index else kwargs["student_logits"].shape[:-1]
        if index:
            high = 2 if index == "few" else rows
            kwargs["student_rows"] = torch.randint(0, high, (pairs,), generator=g).to(device)
            kwargs["teacher_rows"] = torch.randint(0, rows, (pairs,), generator=g).to(device)
            if index == "once":
                kwargs["student_rows"] = torch.randperm(rows, generator=g)[: rows - 1].to(device)
                kwargs["teacher_rows"] = kwargs["teacher_rows"][: rows - 1]
                shape = (rows - 1,)
        size = torch.Size(shape).numel()
        for parameter in per_row:
            least, most = _RANGES.get(parameter, (0.1, 0.9))
            value = least + (most - least) * torch.rand(size, generator=g)
            if parameter == "weight" and size > 2:
                value[2] = 0.0
            kwargs[parameter] = value.reshape(shape).to(device)
        if labelled:
            labels = torch.randint(0, min(v_s, v_t), (size,), generator=g)
            labels[::4] = options.get("ignore_index", -100)
            kwargs["labels"] = labels.reshape(shape).to(device)
        if masked:
            mask = torch.arange(size) % 3 != 1 if masked == "third" else torch.zeros(size).bool()
            kwargs["mask"] = mask.reshape(shape).to(device)
        return kwargs

    # The stored gradient is rounded, and again when the upstream scales it.
    twice = Tolerance(1e-5 + torch.finfo(dtypes[0]).eps / 2, 1e-5)
    low, s_size, t_size = min(v_s, v_t), dtypes[0].itemsize, dtypes[1].itemsize
    read = pairs * low * (s_size + t_size)
    return Case(
        op="divergence",
        id=case_id,
        inputs=inputs,
        shape=(rows, v_s),
        dtypes=dtypes,
        options=options,
        tolerances={**TOLERANCES, "overwrite": twice, **(tolerances or {})},
        bytes={
            "forward": read,
            "backward": read + rows * v_s * s_size,
            "overwrite": read + rows * v_s * s_size,
        },
        flops={phase: n * pairs * low for phase, n in _FLOPS_A_TOKEN.items()},
        marks=frozenset(marks),
        gate=gate,
    )


def _table() -> list[Case]:
    half = {FP32: (FP32, FP32), BF16: (BF16, BF16), FP16: (FP16, FP16)}
    on_ladder = ("ladder",)
    cases: list[Case] = []

    def add(*arguments: Any, **more: Any) -> None:
        cases.append(_case(*arguments, **more))

    for kind in KINDS:
        wide: tuple[str, ...] = (
            ("beta",) if kind == "jsd" else ("alpha",) if kind.startswith("skew") else ()
        )
        wide = ("alpha", "beta") if kind == "alpha_beta" else wide
        # Kinds that share their code with another one run two cases there; all run on a full climb.
        apart = on_ladder if kind in ("forward_kl", "jsd", "adaptive_kl", "alpha_beta") else ()
        # adaptive_kl's search takes a simulated GPU ten seconds on its larger rows.
        short = kind != "adaptive_kl"
        finite = kind not in ("chi2", "alpha_beta")  # these overflow fp32 where d is large
        add("plain", 5, 1000, kind, marks=on_ladder if short else ())
        add("plain", 5, 1000, kind, dtypes=half[BF16])
        add("plain", 5, 1000, kind, dtypes=half[FP16])
        add("mixed", 4, 333, kind, dtypes=(BF16, FP32))
        add("mixed", 4, 333, kind, dtypes=(FP32, BF16))
        add("odd", 3, 31, kind, marks=apart, temperature=1.7, reduction="mean")
        add("one_token", 3, 1, kind)
        add("two_tokens", 7, 2, kind)
        add("identical", 4, 257, kind, pattern="identical", marks=apart if short else ())
        add("one_hot", 6, 100, kind, pattern="one_hot")
        add("ties", 6, 41, kind, pattern="ties")
        add("equal_mass", 2, 96, kind, pattern="equal_mass")
        add("infinite", 8, 67, kind, pattern="infinite", marks=apart)
        add("poisoned", 9, 67, kind, pattern="poisoned", marks=on_ladder)
        # Mirrored rows of an odd size tie in the middle, where tvd's slope hangs on rounding.
        columns = 128 if kind == "tvd" else 129
        if finite:
            add("extreme", 6, columns, kind, pattern="extreme")
        if finite and kind != "adaptive_kl":  # ties at a mass of exactly 1/2 decide its head there
            add("extreme", 6, columns, kind, pattern="extreme", dtypes=half[BF16])
        add("per_row", 8, 200, kind, per_row=("temperature", "weight", *wide), scale_t2=True)
        add("per_row_mean", 8, 200, kind, per_row=("weight", *wide), reduction="mean",
            masked="third")  # fmt: skip
        add("pairs", 6, 130, kind, index="any", per_row=("temperature", "weight"), marks=apart)
        add("labels", 9, 150, kind, labelled=True, label_weight=0.3, z_loss=1e-3, marks=apart)
        add("labels_t", 9, 150, kind, labelled=True, label_weight=0.3, z_loss=1e-3, temperature=2.0,
            scale_t2=True, reduction="mean", dtypes=half[BF16])  # fmt: skip
        large = {"loss": Tolerance(1e-4, 1e-6)} if kind == "adaptive_kl" else None
        add("large", 3, 32000, kind, temperature=2.0, scale_t2=True, tolerances=large)

    for kind in ("forward_kl", "reverse_kl"):
        exact = {"loss": Tolerance(1e-5, 0.0)}
        for vocab in (1000, 32000):
            add("near_equal", 8, vocab, kind, pattern="near_equal", tolerances=exact)
            add("offset", 4, vocab, kind, pattern="offset", tolerances=exact)
        add("near_equal_t", 8, 1000, kind, pattern="near_equal", temperature=0.5, tolerances=exact)
    for kind in ("jsd", "hellinger", "chi2", "skew_forward_kl", "adaptive_kl", "todi"):
        add("near_equal", 8, 1000, kind, pattern="near_equal")
        add("offset", 4, 1000, kind, pattern="offset")

    for a, b in ((1, 0), (0, 1), (0, 0), (0.5, 0), (0, 0.5), (0.5, -0.5), (-0.5, 0.5), (1.5, -0.3)):
        add(f"limit_{a}_{b}", 5, 97, "alpha_beta", alpha=float(a), beta=float(b))
        add(f"limit_{a}_{b}_infinite", 8, 67, "alpha_beta", alpha=float(a), beta=float(b),
            pattern="infinite")  # fmt: skip
    for b in (0.01, 0.99):
        add(f"beta_{b}", 5, 97, "jsd", beta=b)
        add(f"alpha_{b}", 5, 97, "skew_forward_kl", alpha=b)
        add(f"alpha_{b}", 5, 97, "skew_reverse_kl", alpha=b)

    for kind in ("forward_kl", "jsd"):
        for layout in ("padded", "sliced", "transposed", "unaligned", "batched", "permuted"):
            for dtypes in (half[FP32], half[BF16]):
                add(layout, 6, 77, kind, layout=layout, dtypes=dtypes,
                    per_row=("weight",), reduction="mean" if layout == "padded" else "none",
                    marks=on_ladder if layout in ("padded", "batched") else ())  # fmt: skip
        add("expanded_teacher", 6, 77, kind, teacher_layout="expanded")
        for reduction in ("none", "mean", "sum"):
            add(f"zero_rows_{reduction}", 0, 50, kind, reduction=reduction)
            add(f"all_masked_{reduction}", 4, 50, kind, reduction=reduction, masked="all")
            add(f"masked_{reduction}", 7, 50, kind, reduction=reduction, masked="third",
                marks=on_ladder)  # fmt: skip
        add("masked_poisoned", 9, 64, kind, pattern="poisoned", masked="third")
        add("denominator", 7, 50, kind, reduction="mean", denominator=37.0, masked="third")
        add("pairs_few", 6, 130, kind, index="few", dtypes=half[BF16])
        add("pairs_once", 6, 130, kind, index="once", reduction="mean", marks=on_ladder)
        add("pairs_labels", 6, 130, kind, index="any", labelled=True, label_weight=0.5, z_loss=0.01)
        add("min_vocab_s", 5, 130, kind, teacher=101, vocab="min", marks=on_ladder)
        add("min_vocab_t", 5, 101, kind, teacher=130, vocab="min", index="any")
        add("min_vocab_labels", 5, 130, kind, teacher=101, vocab="min", labelled=True,
            label_weight=1.0, reduction="mean")  # fmt: skip
        add("ignore_index", 9, 50, kind, labelled=True, label_weight=0.0, ignore_index=-1)
        add("z_loss_alone", 5, 50, kind, z_loss=0.1)
        add("labels_alone", 9, 50, kind, labelled=True, label_weight=1.0, reduction="sum")
        add("cold", 4, 300, kind, temperature=0.1)
        add("hot", 4, 300, kind, temperature=20.0, scale_t2=True)
    for kind in ("forward_kl", "reverse_kl", "jsd", "tvd", "adaptive_kl"):
        large = {"loss": Tolerance(1e-4, 1e-6)} if kind == "adaptive_kl" else None
        for vocab in (151936, 262144):
            add("huge", 2, vocab, kind, tolerances=large, marks=("slow",))
            add("huge", 2, vocab, kind, tolerances=large, marks=("slow",), dtypes=half[BF16])

    for kind in KINDS:
        for dtypes in (half[FP32], half[BF16]):
            shapes = [(1024, 32000)] + ([(256, 151936)] if kind == "forward_kl" else [])
            for rows, vocab in shapes:
                gate = _case("bench", 8, vocab, kind, dtypes=dtypes, reduction="mean",
                             tolerances={"loss": Tolerance(1e-4, 1e-6)})  # fmt: skip
                add("bench", rows, vocab, kind, dtypes=dtypes, reduction="mean",
                    marks=("bench", "slow"), gate=gate)  # fmt: skip
    return cases


def run(case: Case, inputs: dict[str, Any], impl: str, seed: int) -> dict[str, Tensor]:
    """Every output of the case on backend `impl`."""
    student = inputs.pop("student_logits").detach().requires_grad_()
    loss = divergence(student, impl=impl, **inputs)
    upstream, tangent = _directions(case, student, loss.shape, seed)
    (grad,) = torch.autograd.grad(loss, student, upstream)
    with_stats = divergence_with_stats(student.detach(), impl=impl, **inputs)
    value, along = divergence_jvp(student.detach(), tangent, impl=impl, **inputs)
    out = {
        "loss": loss,
        "grad": grad,
        "loss.with_stats": with_stats.loss,
        "stats": torch.stack(with_stats[1:], dim=-1),
        "loss.with_tangent": value,
        "tangent": along,
    }
    if _can_overwrite(inputs, student):
        leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        spent = leaf.view_as(leaf)
        out["loss.overwrite"] = divergence(spent, overwrite_logits=True, impl=impl, **inputs)
        (out["overwrite"],) = torch.autograd.grad(out["loss.overwrite"], leaf, upstream)
    return out


def truth(case: Case, inputs: dict[str, Any], seed: int) -> dict[str, Expected]:
    """What `run` should give: the reference in fp64."""
    rounded = inputs["student_logits"]
    exact = {k: v.double() if _is_float(v) else v for k, v in inputs.items()}
    student = exact.pop("student_logits").requires_grad_()
    loss = divergence(student, impl="reference", **exact)
    upstream, tangent = _directions(case, rounded, loss.shape, seed)
    upstream, tangent = upstream.double(), tangent.double()
    (grad,) = torch.autograd.grad(loss, student, upstream)
    stats = divergence_with_stats(student.detach(), impl="reference", **exact)

    # Each pair's own gradient, for the tangent and the sizes.
    v_s, v_t = student.shape[-1], exact["teacher_logits"].shape[-1]
    rows_s, rows_t = (exact.get(side) for side in ("student_rows", "teacher_rows"))
    flat = student.detach().reshape(-1, v_s)
    rows_s = torch.arange(flat.shape[0]) if rows_s is None else rows_s
    teacher = exact["teacher_logits"].reshape(-1, v_t)
    pair = flat[rows_s].requires_grad_()
    one_row = {k: v.reshape(-1) if _is_row_tensor(v) else v for k, v in exact.items()}
    one_row |= {"student_rows": None, "teacher_rows": None, "reduction": "none"}
    one_row |= {"denominator": None}
    one_row["teacher_logits"] = teacher if rows_t is None else teacher[rows_t]
    row_loss = divergence(pair, impl="reference", **one_row)
    (slope,) = torch.autograd.grad(row_loss.sum(), pair)
    share = _shares(exact, row_loss)
    along = share * (slope * tangent.reshape(-1, v_s)[rows_s]).nan_to_num(torch.nan).sum(-1)
    along = torch.where(torch.isnan(slope).any(-1), torch.nan, along)

    k = 1 / torch.as_tensor(exact.get("temperature", 1.0), dtype=torch.float64).reshape(-1, 1)
    t2 = k**-2 if exact.get("scale_t2") else torch.ones_like(k)
    weight = exact.get("weight", torch.ones(())).reshape(-1, 1)
    q = torch.softmax(k * pair.detach()[:, : min(v_s, v_t)], dim=-1)
    largest = q.amax(-1, keepdim=True) if q.numel() else q[:, :1]
    size = slope.abs().amax(-1, keepdim=True) + k * t2 * weight * largest
    size = (size * share[:, None]).nan_to_num(0, 0, 0)
    each = upstream.abs().reshape(-1, 1) * size
    if case.kind == "tvd":
        ties = _near_ties(k * pair.detach(), k * one_row["teacher_logits"])
        each = each + upstream.abs().reshape(-1, 1) * share[:, None] * ties
    grad_size = torch.zeros(flat.shape[0], each.shape[1], dtype=torch.float64)
    grad_size.index_add_(0, rows_s, each)
    longest = tangent.abs().amax() if tangent.numel() else 0
    tangent_size = size.squeeze(-1) * longest
    row_size = (t2 * weight).squeeze(-1).expand(row_loss.shape)
    if case.options["reduction"] == "none":
        along, loss_size = along.reshape(loss.shape), row_size.reshape(loss.shape)
        tangent_size = tangent_size.reshape(loss.shape)
    else:
        along, tangent_size = along.sum(), tangent_size.sum()
        loss_size = (share * row_size).sum()
    expected = {
        "loss": Expected(loss, loss_size),
        "grad": Expected(grad, grad_size.reshape(*student.shape[:-1], grad_size.shape[1])),
        "tangent": Expected(along, tangent_size),
        "stats": Expected(torch.stack(stats[1:], dim=-1)),
    }
    same = {
        f"loss.{mode}": expected["loss"] for mode in ("with_stats", "with_tangent", "overwrite")
    }
    return {**expected, **same, "overwrite": expected["grad"]}


def _directions(case: Case, student: Tensor, shape: torch.Size, seed: int) -> tuple[Tensor, Tensor]:
    """A random upstream gradient, and a random tangent in the logits' dtype."""
    g = torch.Generator().manual_seed(seed + 1 + zlib.crc32(case.id.encode()))
    upstream = torch.randn(shape, generator=g)
    tangent = torch.randn(student.shape, generator=g).to(student.dtype)
    return upstream.to(student.device), tangent.to(student.device)


def _shares(exact: dict[str, Any], row_loss: Tensor) -> Tensor:
    """How much each row's weighted loss counts in the result: 1, or 1 / the mean's denominator."""
    ones: Tensor = torch.ones_like(row_loss.detach())
    if exact["reduction"] != "mean":
        return ones
    if exact.get("denominator") is not None:
        return ones / float(exact["denominator"])
    counted = exact["weight"].reshape(-1) if "weight" in exact else ones
    if "mask" in exact:
        counted = torch.where(exact["mask"].reshape(-1), counted, 0)
    if "labels" in exact:
        kept = exact["labels"].reshape(-1) != exact.get("ignore_index", -100)
        counted = torch.where(kept, counted, 0)
    total = counted.sum()
    return ones / total if total else 0 * ones


def _near_ties(student: Tensor, teacher: Tensor) -> Tensor:
    """The size that lets a token of tvd take either sign: large where p is nearly q."""
    q, d = student.softmax(-1), teacher.log_softmax(-1) - student.log_softmax(-1)
    return torch.where((d != 0) & (d.abs() < 1e-5), q / TOLERANCES["grad"].atol, 0)


def _can_overwrite(inputs: dict[str, Any], student: Tensor) -> bool:
    rows = inputs.get("student_rows")
    once = rows is None or rows.unique().numel() == rows.numel()
    flat = student.detach().flatten(0, -2) if student.ndim > 2 else student
    in_place = flat.data_ptr() == student.data_ptr() and flat.stride(-1) == 1
    return inputs["reduction"] != "none" and once and in_place


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.dtype.is_floating_point)


def _is_row_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


CASES: list[Case] = _table()
