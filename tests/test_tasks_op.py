"""`task_linear`: every core against the float64 reference, rows of no task, and what autograd asks for."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from ops_support import Backward, check
from support import TOLERANCE, assert_close, relative_error, singular_problem
from torch._dynamo.testing import CompileCounterWithBackend

from fastspec import _extension, task_linear
from fastspec.cores import CORES, LINEAR, core_matrix
from fastspec.ops import aten, reference

# (out, in, k, tokens of a row): both orientations, k of 1, full rank, sizes that divide nothing, rows above
# and below the 128 from which csrc/ multiplies by products of its own
SIZES = [
    (1, 1, 1, (1,)),
    (40, 24, 5, ()),
    (24, 40, 5, (3, 2)),
    (63, 17, 17, (20,)),
    (17, 63, 4, (33,)),
    (80, 80, 65, (7,)),
]
TASK = torch.tensor([3, -1, 0, 3, 6, -1, 1])  # in any order, two alike, two unadapted, some unused
TASKS = 7


def problem(out_features, in_features, k, tokens, core, dtype=torch.float32, bias=True):
    """Operands with a table of TASKS cores, and x, g of len(TASK) rows."""
    p = singular_problem(out_features, in_features, k, core=core, n=1, dtype=dtype, bias=bias)
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    wide = p.pop("delta")
    p["table"] = 0.1 * normal(TASKS, *wide.shape).to(wide.dtype)
    p["x"] = normal(len(TASK), *tokens, in_features).to(dtype)
    p["g"] = normal(len(TASK), *tokens, out_features).to(dtype)
    return p


def run(p, core, task=TASK, singular_basis=True, f=task_linear):
    """y and the gradients of x, bias, table."""
    x, table = p["x"].clone().requires_grad_(), p["table"].clone().requires_grad_()
    bias = None if p["bias"] is None else p["bias"].clone().requires_grad_()
    if f is task_linear:
        factors = (p["u"], p["s"], p["vh"])
        y = f(x, p["weight"], bias, *factors, table, task, core=core, singular_basis=singular_basis)
    else:
        y = f(x, p["weight"], bias, p["u"], p["vh"], table, task, core)
    y.backward(p["g"])
    return y.detach(), x.grad, table.grad, None if bias is None else bias.grad


def exact(p, core, task=TASK):
    doubles = {name: None if t is None else t.double() for name, t in p.items()}
    return run(doubles, core, task, f=reference.task_linear)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("singular_basis", [True, False], ids=["short", "two-sided"])
def test_against_the_reference(core, sizes, dtype, singular_basis):
    p = problem(*sizes, core, dtype)
    check(run(p, core, singular_basis=singular_basis), exact(p, core))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_types(core, dtype):
    p = problem(48, 80, 12, (5,), core, dtype)
    got = run(p, core)
    check(got, exact(p, core), dtype)
    assert got[2].dtype == torch.float32


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_of_no_task_are_the_frozen_layer_bit_for_bit(core, sizes):
    p = problem(*sizes, core)
    p["table"][0] = float("nan")  # whatever stands in the table
    for task in (torch.full((7,), -1), torch.tensor([1, -1, 2, -1, -5, 3, -1])):
        y = run(p, core, task)[0]
        plain = F.linear(p["x"], p["weight"], p["bias"])
        assert torch.equal(y[task < 0], plain[task < 0])


@pytest.mark.parametrize("core", CORES)
def test_the_reference_is_each_row_with_its_own_core(core):
    p = problem(9, 6, 3, (4,), core, torch.float64)
    y = reference.task_linear(
        p["x"], p["weight"], p["bias"], p["u"], p["vh"], p["table"], TASK, core
    )
    for row, t in enumerate(TASK.tolist()):
        w = p["weight"]
        if t >= 0:
            w = w + p["u"] @ core_matrix(p["table"][t], core) @ p["vh"]
        assert_close(y[row], p["x"][row] @ w.mT + p["bias"])


@pytest.mark.parametrize("sizes", [(24, 40, 5, (3,)), (40, 24, 5, (3,))], ids=["out<in", "in<out"])
def test_the_short_side_is_taken_and_left_in_time(sizes):
    """With factors that are not the weight's the identity fails, which shows whether it was used."""
    p = problem(*sizes, "diag")
    if sizes[0] < sizes[1]:
        p["u"] = torch.linalg.qr(torch.randn(24, 5))[0]
    else:
        p["vh"] = torch.linalg.qr(torch.randn(24, 5))[0].mT
    want = exact(p, "diag")
    wrong = max(relative_error(a, b) for a, b in zip(run(p, "diag"), want, strict=True))
    assert wrong > 1e-2
    p["s"][-1] = 0.9 * aten.SIGMA_FLOOR * p["s"][0]
    check(run(p, "diag"), want)


@pytest.mark.parametrize("smallest", [0.0, 0.9 * aten.SIGMA_FLOOR])
@pytest.mark.parametrize("sizes", [(24, 40, 5, (3,)), (40, 24, 5, (3,))], ids=["out<in", "in<out"])
def test_a_small_singular_value_is_not_divided_by(sizes, smallest):
    p = problem(*sizes, "dense")
    u, s, vh = torch.linalg.svd(p["weight"], full_matrices=False)
    s[4:] = smallest * s[0]
    p["weight"], p["s"] = (u * s) @ vh, s[:5]
    check(run(p, "dense"), exact(p, "dense"))


@pytest.mark.parametrize("core", LINEAR)
def test_gradients_by_needs(core):
    """Without a trained table nothing is saved and no gradient of it computed; so with dx."""
    p = problem(24, 40, 5, (3,), core)
    want = exact(p, core)
    factors = (p["u"], p["s"], p["vh"])
    own = {p[n].data_ptr() for n in ("weight", "u", "s", "vh", "table")} | {TASK.data_ptr()}

    def saved(x, table):
        kept = []

        def pack(t):
            kept.append(0 if t.data_ptr() in own else t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = task_linear(x, p["weight"], p["bias"], *factors, table, TASK, core=core)
        with Backward("task_linear_backward") as backward:
            y.backward(p["g"])
        return sum(kept), backward.needs, backward.computed

    x = p["x"].clone().requires_grad_()
    assert saved(x, p["table"]) == (0, [(True, False)], [(x.numel(), 0)])
    assert_close(x.grad, want[1])
    table = p["table"].clone().requires_grad_()
    own.add(table.data_ptr())
    assert saved(p["x"], table) == (len(TASK) * 3 * 5, [(False, True)], [(0, table.numel())])
    assert_close(table.grad, want[2])


@pytest.mark.parametrize("core", CORES)
def test_rows_of_the_table_that_the_batch_does_not_name_get_no_gradient(core):
    p = problem(24, 40, 5, (3,), core)
    grad = run(p, core)[2]
    unnamed = [t for t in range(TASKS) if t not in TASK.tolist()]
    assert not grad[unnamed].any()
    assert all(grad[t].any() for t in set(TASK.tolist()) - {-1})


@pytest.mark.parametrize("core", CORES)
def test_gradients_are_the_same_every_time(core):
    p = problem(24, 40, 16, (8,), core)
    task = torch.tensor([2, 2, 2, 5, 2, 5, 2])
    first = run(p, core, task)[2]
    assert all(torch.equal(run(p, core, task)[2], first) for _ in range(3))


@pytest.mark.parametrize("core", CORES)
def test_gradcheck(core):
    p = problem(7, 5, 3, (2,), core, torch.float64)
    leaves = [p[n].requires_grad_() for n in ("x", "bias", "table")]
    for singular_basis in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, bias, table, sb=singular_basis: task_linear(
                x,
                p["weight"],
                bias,
                p["u"],
                p["s"],
                p["vh"],
                table,
                TASK,
                core=core,
                singular_basis=sb,
            ),
            leaves,
        )


@pytest.mark.parametrize("core", LINEAR)
def test_opcheck(core):
    p = problem(8, 12, 3, (2,), core)
    factors = [p[n] for n in ("u", "s", "vh")]
    x, table = p["x"].clone().requires_grad_(), p["table"].clone().requires_grad_()
    args = (x, p["weight"], p["bias"], *factors, table, TASK, core, True, True)
    torch.library.opcheck(torch.ops.fastspec.task_linear.default, args)
    saved = torch.randn(len(TASK) * 2, 3)
    back = (p["g"], saved, p["weight"], *factors, p["table"], TASK, core, True)
    for needs in ((True, True), (False, True)) if core == "diag" else ((True, False),):
        torch.library.opcheck(torch.ops.fastspec.task_linear_backward.default, (*back, *needs))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("rows", [(0, 3), (7, 0)], ids=["no rows", "no tokens"])
def test_empty(core, rows):
    p = problem(12, 8, 3, (2,), core)
    b, t = rows
    p["x"], p["g"] = torch.randn(b, t, 8), torch.randn(b, t, 12)
    got = run(p, core, TASK[:b])
    assert got[0].shape == (b, t, 12)
    assert not got[2].any()


def test_inputs_that_are_not_contiguous():
    p = problem(12, 8, 3, (4,), "diag")
    want = run(p, "diag")
    p["x"] = torch.stack([p["x"], p["x"]], -1)[..., 0]
    p["weight"] = p["weight"].mT.contiguous().mT
    check(run(p, "diag"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    p = problem(40, 24, 5, (6,), "dense")
    x, table = p["x"].clone().requires_grad_(), p["table"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        operands = (p["weight"], p["bias"], p["u"], p["s"], p["vh"])
        y = task_linear(x, *operands, table, TASK, core="dense", singular_basis=True)
        plain = F.linear(p["x"], p["weight"], p["bias"])
    assert y.dtype == dtype
    assert torch.equal(y[TASK < 0], plain[TASK < 0])
    y.backward(p["g"].to(dtype))
    assert x.grad.dtype == table.grad.dtype == torch.float32
    for got, want in zip((y, x.grad, table.grad), exact(p, "dense")[:3], strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("core", CORES)
def test_the_transforms_of_torch_func(core):
    p = problem(24, 40, 5, (3,), core)

    def loss(table, x):
        factors = (p["u"], p["s"], p["vh"])
        y = task_linear(
            x, p["weight"], p["bias"], *factors, table, TASK, core=core, singular_basis=True
        )
        return (y * p["g"]).sum()

    dtable, dx = torch.func.grad(loss, (0, 1))(p["table"], p["x"])
    want = exact(p, core)
    assert_close(dx, want[1])
    assert_close(dtable, want[2])


@pytest.mark.skipif(_extension.load() is not None, reason="the compiled part is not there")
def test_all_of_this_without_the_compiled_part():
    """The operators in Python serve other machines: this file again, with csrc/ switched off."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"FASTSPEC_NO_EXT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 skipped" in done.stdout


def test_other_tasks_do_not_recompile():
    p = problem(40, 24, 5, (6,), "diag")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def call(x, table, task):
        return task_linear(x, p["weight"], p["bias"], p["u"], p["s"], p["vh"], table, task)

    for task in (TASK, TASK.flip(0), torch.tensor([-1, -1, -1, -1, 2, -1, -1])):
        x, table = p["x"].clone().requires_grad_(), p["table"].clone().requires_grad_()
        call(x, table, task).backward(p["g"])
        want = exact(p, "diag", task)
        assert_close(x.grad, want[1])
        assert_close(table.grad, want[2])
        p["table"] = p["table"] + 0.1
    assert counter.frame_count == 1


def test_errors_name_the_argument():
    p = problem(12, 8, 3, (2,), "diag")
    good = [p[n] for n in ("x", "weight", "bias", "u", "s", "vh", "table")] + [TASK]

    def call(**changes):
        names = ("x", "weight", "bias", "u", "s", "vh", "table", "task")
        core = changes.pop("core", "diag")
        operands = dict(zip(names, good, strict=True)) | changes
        return task_linear(*operands.values(), core=core)

    with pytest.raises(ValueError, match=r"one entry of dimension 0 for each of the 7 .*\[14, 8\]"):
        call(x=p["x"].reshape(14, 8))
    with pytest.raises(ValueError, match="dimension 0"):
        call(x=p["x"][0, 0], task=TASK[:1])
    with pytest.raises(TypeError, match=r"int64 \[B\], got torch.int32"):
        call(task=TASK.int())
    with pytest.raises(ValueError, match=r"delta must be \[3\], got \[4\]"):
        call(table=torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"table must hold .*\(3,\)"):
        call(table=torch.zeros(3))
    with pytest.raises(ValueError, match=r"delta must be \[3, 3\]"):
        call(core="dense")
    with pytest.raises(TypeError, match=r"dtype torch.float32, got torch.float64"):
        call(x=p["x"].double())
    with pytest.raises(IndexError):
        call(task=TASK + 4)
