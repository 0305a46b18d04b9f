"""The operators under autograd: what is computed and saved, opcheck, gradcheck, transforms, torch.compile."""

import pytest
import torch
from ops_support import Backward, check, exact, layer_call, run
from support import TOLERANCE, assert_close, relative_error, singular_problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastspec.cores import CORES, LINEAR
from fastspec.ops import reference
from fastspec.ops.functional import spectral_linear
from fastspec.ops.plan import LayerCall, Plan, legal_plans

FACTORS = ("weight", "u", "s", "vh", "delta")


@pytest.mark.parametrize("core", LINEAR)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("needs_delta", [True, False])
def test_the_backward_computes_what_is_needed_and_no_more(core, shape, needs_dx, needs_delta):
    p = singular_problem(*shape, 5, core=core)
    y, dx, ddelta, dbias = exact(p, core)
    want = (y, dx if needs_dx else None, ddelta if needs_delta else None, dbias)
    call = LayerCall(17, shape[1], shape[0], 5, core, needs_dx=needs_dx, needs_delta=needs_delta)
    for plan in legal_plans(call):
        with Backward("spectral_linear_backward") as backward:
            check(run(p, core, plan, needs_dx, needs_delta), want)
        if needs_dx or needs_delta:
            assert backward.needs == [(needs_dx, needs_delta)], plan
            assert backward.computed == [(dx.numel() * needs_dx, ddelta.numel() * needs_delta)]
        else:
            assert not backward.needs, plan


def saved_numbers(p, core, plan, **kw):
    """How many numbers autograd keeps that are no argument of the layer itself."""
    own = {p[n].data_ptr() for n in FACTORS}
    kept = []

    def pack(t):
        if t.data_ptr() not in own:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = p["x"].clone().requires_grad_(kw.get("needs_dx", True))
        delta = p["delta"].requires_grad_(kw.get("needs_delta", True))
        spectral_linear(
            x, p["weight"], p["bias"], p["u"], p["s"], p["vh"], delta,
            core=core, singular_basis=True, plan=plan,
        )  # fmt: skip
    return sum(kept)


@pytest.mark.parametrize("core", LINEAR)
def test_only_p_is_saved(core):
    p = singular_problem(40, 24, 5, core=core, n=30)
    for plan in legal_plans(LayerCall(30, 24, 40, 5, core)):
        expected = 30 * 24 if plan.gradient == "dense" else 30 * 5
        expected += 40 * 24 if plan.forward == "saved" else 0
        assert saved_numbers(p, core, plan) == expected, plan
    assert saved_numbers(p, core, Plan("merged", "none"), needs_delta=False) == 0


@pytest.mark.parametrize("core", LINEAR)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("forward", ["merged", "factored"])
def test_opcheck(core, shape, forward):
    p = singular_problem(*shape, 3, core=core, n=6)
    for gradient in ("two_sided", "dense"):
        x, delta = p["x"].clone().requires_grad_(), p["delta"].clone().requires_grad_()
        factors = (p["u"], p["s"], p["vh"])
        args = (x, p["weight"], p["bias"], *factors, delta, core, forward, gradient)
        torch.library.opcheck(torch.ops.fastspec.spectral_linear.default, args)
        saved = (p["x"], torch.randn(6, 3))
        back = (p["g"], *saved, p["weight"], *factors, p["delta"], core, forward, gradient)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.fastspec.spectral_linear_backward.default, (*back, *needs)
            )


@pytest.mark.parametrize("core", CORES)
def test_gradcheck_of_the_operator(core):
    p = singular_problem(7, 5, 3, core=core, n=4, dtype=torch.float64)
    leaves = [p[n].requires_grad_() for n in ("x", "bias", "delta")]
    for plan in legal_plans(LayerCall(4, 5, 7, 3, core, torch.float64)):
        assert torch.autograd.gradcheck(
            lambda x, bias, delta, plan=plan: spectral_linear(
                x, p["weight"], bias, p["u"], p["s"], p["vh"], delta,
                core=core, singular_basis=True, plan=plan,
            ),
            leaves,
        )  # fmt: skip


def test_double_use_in_one_graph_and_checkpointing():
    p = singular_problem(24, 24, 5)
    call = layer_call(p, Plan("merged", "two_sided"))

    def grads(wrap):
        x, delta = p["x"].clone().requires_grad_(), p["delta"].clone().requires_grad_()
        wrap(call, wrap(call, x, delta).relu(), delta).backward(p["g"])
        return x.grad, delta.grad

    plain = grads(lambda f, *a: f(*a))
    again = grads(lambda f, *a: checkpoint(f, *a, use_reentrant=False))
    d = {n: t.double() for n, t in p.items()}
    x, delta = d["x"].requires_grad_(), d["delta"].requires_grad_()

    def ref(x):
        return reference.spectral_linear(x, d["weight"], d["bias"], d["u"], d["vh"], delta)

    ref(ref(x).relu()).backward(d["g"])
    for a, b, want in zip(plain, again, (x.grad, delta.grad), strict=True):
        assert torch.equal(a, b)
        assert_close(a, want)


@pytest.mark.parametrize("core", CORES)
def test_function_transforms(core):
    """vmap over samples and forward mode give what the reference gives."""
    p = singular_problem(12, 8, 3, core=core, dtype=torch.float64)

    def loss(delta, x, g):
        y = spectral_linear(
            x,
            p["weight"],
            p["bias"],
            p["u"],
            p["s"],
            p["vh"],
            delta,
            core=core,
            singular_basis=True,
        )
        return (y * g).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(p["delta"], p["x"], p["g"])
    assert_close(each.sum(0), exact(p, core)[2])
    _, along = torch.func.jvp(lambda d: loss(d, p["x"], p["g"]), (p["delta"],), (p["delta"],))
    assert_close(along, (exact(p, core)[2] * p["delta"]).sum())


def test_weights_that_need_gradients_get_them():
    p = singular_problem(12, 8, 3, dtype=torch.float64)
    w = p["weight"].clone().requires_grad_()
    y = spectral_linear(p["x"], w, None, p["u"], p["s"], p["vh"], p["delta"])
    y.backward(p["g"])
    assert_close(w.grad, p["g"].mT @ p["x"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_products_and_not_the_coefficients(dtype):
    p = singular_problem(40, 24, 5, n=30)
    x, delta = p["x"].clone().requires_grad_(), p["delta"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = layer_call(p)(x, delta)
    assert y.dtype == dtype
    y.backward(p["g"].to(dtype))
    assert x.grad.dtype == torch.float32
    assert delta.grad.dtype == torch.float32
    want = exact(p, "diag")
    for got, w in zip((y, x.grad, delta.grad), want[:3], strict=True):
        assert relative_error(got, w) < TOLERANCE[dtype]


def test_compile_fullgraph_without_recompilation():
    p = singular_problem(40, 24, 5, n=30)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_call(p), fullgraph=True, backend=counter)
    for shift in (0.0, 0.5, -1.0):
        x = p["x"].clone().requires_grad_()
        delta = (p["delta"] + shift).requires_grad_()
        compiled(x, delta).backward(p["g"])
        want = exact(dict(p, delta=delta.detach()), "diag")
        assert_close(x.grad, want[1])
        assert_close(delta.grad, want[2])
    assert counter.frame_count == 1
