"""The modules are `pydistill.divergence` with the kind fixed: same numbers, options and errors."""

import inspect

import pytest
import torch

from pydistill import KINDS, divergence, losses

CLASSES = {
    "forward_kl": losses.ForwardKL,
    "reverse_kl": losses.ReverseKL,
    "jsd": losses.JSD,
    "tvd": losses.TVD,
    "skew_forward_kl": losses.SkewForwardKL,
    "skew_reverse_kl": losses.SkewReverseKL,
    "alpha_beta": losses.AlphaBeta,
    "adaptive_kl": losses.AdaptiveKL,
    "hellinger": losses.Hellinger,
    "chi2": losses.Chi2,
    "todi": losses.ToDi,
}
OWN = {
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "alpha_beta": {"alpha": 0.4, "beta": 0.5},
}


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 17, requires_grad=True), torch.randn(2, 3, 17)


def test_every_kind_has_a_module() -> None:
    assert set(CLASSES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_the_function(kind: str) -> None:
    student, teacher = logits()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    weight, labels = torch.rand(2, 3), torch.randint(0, 17, (2, 3))
    options = dict(
        temperature=1.5, scale_t2=True, label_weight=0.2, z_loss=0.01, **OWN.get(kind, {})
    )
    tensors = {"mask": mask, "weight": weight, "labels": labels, "denominator": 4.0}
    got = CLASSES[kind](**options)(student, teacher, **tensors)
    want = divergence(student, teacher, kind, **options, **tensors)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x, student)[0] for x in (got, want)))


@pytest.mark.parametrize("kind", OWN)
def test_own_parameters_come_first(kind: str) -> None:
    student, teacher = logits()
    got = CLASSES[kind](*OWN[kind].values())(student, teacher)
    assert torch.equal(got, divergence(student, teacher, kind, **OWN[kind]))


def test_row_arguments() -> None:
    student, teacher = torch.randn(5, 17), torch.randn(3, 17)
    rows = {"student_rows": torch.tensor([4, 1]), "teacher_rows": torch.tensor([0, 0])}
    got = losses.ForwardKL(reduction="none")(student, teacher, **rows)
    assert torch.equal(got, divergence(student[[4, 1]], teacher[[0, 0]], reduction="none"))


def test_options_of_the_function_are_all_there() -> None:
    function = inspect.signature(divergence).parameters
    module = {
        *inspect.signature(losses.Divergence.__init__).parameters,
        *inspect.signature(losses.Divergence.forward).parameters,
    }
    assert set(function) == module - {"self"}
    for name, value in inspect.signature(losses.Divergence.__init__).parameters.items():
        if name not in ("self", "kind"):
            assert value.default == function[name].default, name


def test_repr_shows_what_is_not_default() -> None:
    assert repr(losses.JSD(0.3, temperature=2.0)) == "JSD(beta=0.3, temperature=2.0)"
    assert repr(losses.ForwardKL()) == "ForwardKL()"
    assert (
        repr(losses.Divergence("tvd", reduction="sum")) == "Divergence(kind='tvd', reduction='sum')"
    )


def test_errors_are_the_function_s() -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match=r"beta=1\.5 is outside"):
        losses.JSD(1.5)(student, teacher)
    with pytest.raises(ValueError, match="kind='kl' is not known"):
        losses.Divergence("kl")(student, teacher)
    with pytest.raises(TypeError, match="bta"):
        losses.ForwardKL(bta=0.5)


def test_no_state() -> None:
    assert not losses.ForwardKL().state_dict() and not list(losses.ForwardKL().parameters())
