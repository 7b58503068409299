"""`decoder_layer`: the table of cases on every instruction set, the model's own layers, memory that
nobody may read, and what it refuses."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from pydistill import _native, _registry
from pydistill.ops.decoder_layer import decoder_layer, has_kernel
from pydistill.testing import Case, check, load
from pydistill.testing.cases.decoder_layer import layer_case

OP = "decoder_layer"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE = [case for case in load(OP) if "bench" not in case.marks]


@pytest.mark.parametrize("case", TABLE, ids=repr)
def test_case(case: Case, check_everywhere: Callable[[Case], None]) -> None:
    check_everywhere(case)


@settings(max_examples=150, deadline=None)
@hypothesis.given(
    st.integers(1, 3), st.integers(1, 9), st.integers(0, 40), st.integers(1, 3), st.integers(1, 4),
    st.integers(1, 40), st.integers(4, 70), st.integers(1, 70), st.sampled_from(DTYPES),
    st.integers(0, 12), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(_native.supported_capabilities() or ["none"]),
)  # fmt: skip
def test_any_shape(
    batch: int, tokens: int, columns: int, groups: int, shared: int, half: int, width: int,
    inner: int, dtype: torch.dtype, window: int, padded: bool, bias: bool, norms: bool,
    capability: str,
) -> None:  # fmt: skip
    """Of less than four numbers there is often none that is not cancelled."""
    if not has_kernel("cpu", dtype):
        pytest.skip("the native library has no decoder_layer; run `make build`")
    case = layer_case(
        "any", batch, tokens, columns, dtype, width=width, heads=(groups * shared, groups),
        size=2 * half, inner=inner, bias=bias, norms=norms, window=window, padded=padded,
    )  # fmt: skip
    with _native.use_capability(capability):
        report = check(case, "cpu")
    assert report.ok, report.message


def given(name: str, seed: int = 0) -> dict[str, Any]:
    return next(case for case in TABLE if case.id.startswith(name)).inputs("cpu", seed)


def test_a_request_does_not_see_its_neighbours(impl: str) -> None:
    inputs = given("batch-fp32")
    for name in ("hidden", "keys", "values"):
        inputs[name][1] = torch.nan
    inputs["keys"][:, :, -1] = torch.nan  # room behind the new columns
    got = decoder_layer(**inputs, impl=impl)
    clean = decoder_layer(**given("batch-fp32"), impl=impl)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[2], clean[2])
    assert bool(got[1].isnan().any())


def test_nothing_but_new_columns_is_written(impl: str) -> None:
    inputs = given("few-bf16")
    before = {name: inputs[name].clone() for name in ("hidden", "keys", "values")}
    decoder_layer(**inputs, impl=impl)
    assert torch.equal(inputs["hidden"], before["hidden"])
    new = slice(inputs["columns"], inputs["columns"] + 5)
    for name in ("keys", "values"):
        before[name][:, :, new] = inputs[name][:, :, new]
        torch.testing.assert_close(inputs[name], before[name], rtol=0, atol=0, equal_nan=True)


def test_tokens_one_by_one(impl: str) -> None:
    """A token's state does not depend on those behind it."""
    inputs = given("few-fp32")
    whole = decoder_layer(**inputs, impl=impl)
    again = given("few-fp32")
    parts = []
    for t in range(5):
        part = {name: again[name][:, t : t + 1].contiguous() for name in ("hidden", "cos", "sin")}
        one = {**again, **part, "columns": again["columns"] + t}
        parts.append(decoder_layer(**one, impl=impl))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_cache_may_be_any_view(impl: str) -> None:
    inputs = given("batch-fp32")
    other = {**given("batch-fp32")}
    for name in ("keys", "values"):
        rows = other[name].transpose(1, 2).contiguous()
        other[name] = rows.transpose(1, 2)
    torch.testing.assert_close(
        decoder_layer(**inputs, impl=impl), decoder_layer(**other, impl=impl), rtol=0, atol=0
    )
    torch.testing.assert_close(inputs["keys"], other["keys"], rtol=0, atol=0, equal_nan=True)


def test_results_do_not_depend_on_threads(each_cpu: str) -> None:
    for name in ("real-heads-bf16", "many-fp32"):
        torch.set_num_threads(1)
        want = decoder_layer(**given(name), impl=each_cpu)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(decoder_layer(**given(name), impl=each_cpu), want)


def test_version_counters(impl: str) -> None:
    inputs = given("few-fp32")
    leaf = torch.ones_like(inputs["keys"], requires_grad=True)
    inputs["keys"] = leaf * 1
    loss = inputs["keys"].square().sum()
    with torch.no_grad():
        decoder_layer(**inputs, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_refused(impl: str) -> None:
    inputs = given("one-fp32")
    inputs["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient; call it under torch\.no_grad"):
        decoder_layer(**inputs, impl=impl)
    with torch.no_grad():
        assert not decoder_layer(**inputs, impl=impl).requires_grad


@pytest.mark.parametrize("name", ["hidden", "keys"])
def test_tangents_are_refused(name: str, impl: str) -> None:
    inputs = given("one-fp32")
    with torch.no_grad(), forward_ad.dual_level():
        inputs[name] = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
        with pytest.raises(RuntimeError, match="drops tangents"):
            decoder_layer(**inputs, impl=impl)


def test_opcheck() -> None:
    inputs = given("biased-fp32")
    arguments = (
        inputs["hidden"], *inputs["weights"], *(inputs[x] for x in ("cos", "sin")),
        *(inputs[x].nan_to_num() for x in ("keys", "values")), inputs["starts"],
        inputs["columns"], 1e-5, 0.25, 0, torch.zeros_like(inputs["hidden"]),
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    op = _registry.overload("decoder_layer_out", "cpu")
    torch.library.opcheck(op, arguments, test_utils=tests)


def small(x: Tensor) -> Tensor:
    return x[:, :, :-1].contiguous()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": small}, "room for 69 columns"),
        ({"values": Tensor.half}, "keys must be fp32|of hidden's dtype"),
        ({"hidden": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous"),
        ({"cos": lambda x: x[:, :, :-2].contiguous()}, "cos and sin must be"),
        ({"starts": lambda x: x - 1}, "negative"),
        ({"starts": Tensor.int}, "starts must be"),
        ({"columns": lambda x: -1}, "room for"),
        ({"weights": lambda x: x._replace(down=x.down.t())}, "down must be"),
        ({"weights": lambda x: x._replace(k=x.k[:3])}, "k must be"),
        ({"weights": lambda x: x._replace(q_norm=x.input_norm)}, "q_norm must be"),
    ],
)
def test_what_the_kernel_refuses(
    changes: dict[str, Callable[[Any], Any]], words: str, native_impl: str
) -> None:
    inputs = {**given("few-fp32")}
    inputs["keys"], inputs["values"] = (
        inputs[x][:, :, :69].contiguous() for x in ("keys", "values")
    )
    for name, change in changes.items():
        inputs[name] = change(inputs[name])
    with pytest.raises(RuntimeError, match=words):
        decoder_layer(**inputs, impl=native_impl)
