"""torch.compile sees through the CUDA cuda: on the graphs that it would hand to its backend.

No GPU takes part. A driver that only names a chip lets Triton's front end run, so that PyTorch finds out
which operands a kernel writes; kernels are never started. CPU builds of PyTorch have no autograd on fake
CUDA tensors: whole steps are traced on CPU tensors that the CUDA route takes for its own, and forwards on
fake CUDA tensors.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
from functorch.compile import make_boxed_func
from kernel_problems import exact, problem
from support import assert_close
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from fastspec.kernels import choice, tiles
from fastspec.ops import cuda
from fastspec.ops.functional import spectral_linear, task_linear
from fastspec.ops.plan import Plan

BF16 = torch.bfloat16
FORWARD, BACKWARD = "spectral_linear_fwd_kernel", "spectral_linear_bwd_kernel"


class Chip:
    """As much of a Triton driver as tracing asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def one_h100(tmp_path, monkeypatch):
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", Chip())
    monkeypatch.setattr(tiles, "capability", lambda device: 90)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(choice, "measure", lambda *_: pytest.fail("timed while tracing"))
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setenv("FASTSPEC_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTSPEC_BACKEND", raising=False)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    torch._dynamo.reset()


class Backend:
    """Compiles nothing and keeps the graphs: of the forward, then of the backward."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []
        self.compiler = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)

    def keep(self, module, inputs):
        self.graphs.append(module.graph)
        return make_boxed_func(module.forward)

    def compile(self, f, **options):
        return torch.compile(f, backend=self.compiler, fullgraph=True, **options)

    def launches(self) -> list[tuple[str, set[str]]]:
        """(kernel, operands it writes) of every launch, in order."""
        nodes = [node for graph in self.graphs for node in graph.nodes]
        return [
            (
                kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__,
                set(node.kwargs["tensors_to_clone"]),
            )
            for node in nodes
            if "triton_kernel_wrapper" in str(node.target)
        ]

    def targets(self) -> str:
        return " ".join(str(node.target) for graph in self.graphs for node in graph.nodes)


def operands(core="diag", device="cpu", dtype=BF16, rows=(8, 20), d=768, out=256, k=32) -> dict:
    trained = device == "cpu"
    delta = {"diag": (k,), "band": (3, k), "dense": (k, k)}[core]
    like = {"dtype": dtype, "device": device}
    return {
        "x": torch.empty(*rows, d, **like, requires_grad=trained),
        "weight": torch.empty(out, d, **like),
        "bias": torch.empty(out, **like),
        "u": torch.empty(out, k, **like),
        "s": torch.empty(k, device=device),
        "vh": torch.empty(k, d, **like),
        "delta": torch.empty(*delta, device=device, requires_grad=trained),
    }


@pytest.mark.parametrize("core", ["diag", "band", "dense"])
def test_a_training_step_is_seen_whole(core):
    """Two launches, of which nothing but the outputs is copied, and the cuda are gone."""
    backend = Backend()
    t = operands(core)
    y = backend.compile(spectral_linear)(**t, core=core)
    y.sum().backward()
    assert y.shape == (8, 20, 256)
    assert t["x"].grad.shape == (8, 20, 768)
    assert t["delta"].grad.shape == t["delta"].shape
    assert backend.launches() == [
        (FORWARD, {"y_ptr", "p_ptr"}),
        (BACKWARD, {"dx_ptr", "shares_ptr"}),
    ]
    assert "fastspec" not in backend.targets()


def test_rows_may_be_dynamic():
    """One graph for every number of rows that is more than one tile."""
    backend = Backend()
    compiled = backend.compile(spectral_linear, dynamic=True)
    for rows in ((8, 20), (3, 50), (9, 110)):
        t = operands(rows=rows)
        y = compiled(**t)
        y.sum().backward()
        assert y.shape == (*rows, 256)
        assert t["x"].grad.shape == (*rows, 768)
    assert [name for name, _ in backend.launches()] == [FORWARD, BACKWARD]
    launch = next(n for n in backend.graphs[0].nodes if "triton_kernel" in str(n.target))
    assert isinstance(launch.kwargs["kwargs"]["N"], torch.fx.Node)


def test_tasks_of_the_rows():
    backend = Backend()
    t = operands()
    del t["delta"]
    table = torch.empty(5, 32, requires_grad=True)
    task = torch.empty(8, dtype=torch.int64)
    backend.compile(task_linear)(**t, table=table, task=task).sum().backward()
    assert table.grad.shape == (5, 32)
    names = [name for name, _ in backend.launches()]
    assert names == [FORWARD, BACKWARD, "sum_by_task_kernel"]
    assert "fastspec" not in backend.targets()


@pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="torch.compile takes no fake tensors from outside"
)
def test_a_forward_on_fake_cuda_tensors(monkeypatch):
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    backend = Backend()
    with FakeTensorMode(), torch.no_grad():
        t = operands(device="cuda")
        assert backend.compile(spectral_linear)(**t).device.type == "cuda"
    assert backend.launches() == [(FORWARD, {"y_ptr", "p_ptr"})]
    assert "fastspec" not in backend.targets()


def test_the_choice_is_that_of_the_cache():
    """What was timed before is taken: here ATen's calls for the forward."""
    backend = Backend()
    t = operands()
    matrices = (t["x"].view(-1, 768), t["weight"], t["u"], t["vh"])
    kind = choice.describe("fwd", "diag", matrices, True, True)
    choice.choices(t["x"].device).remember(kind, "aten")
    backend.compile(spectral_linear)(**t).sum().backward()
    assert [name for name, _ in backend.launches()] == [BACKWARD]
    assert "addmm" in backend.targets()
    assert "fastspec" not in backend.targets()


def test_tma_descriptors_stay_inside_the_operator(monkeypatch):
    """PyTorch does not trace them; the operator, left whole, takes them when it runs."""
    monkeypatch.setenv("FASTSPEC_BACKEND", "tma")
    backend = Backend()
    backend.compile(spectral_linear)(**operands()).sum().backward()
    assert not backend.launches()
    assert "fastspec.spectral_linear.default" in backend.targets()
    assert "fastspec.spectral_linear_backward.default" in backend.targets()


def test_a_plan_that_looks_at_values_stays_whole():
    backend = Backend()
    t = operands(dtype=torch.float32)
    plan = Plan("merged", "short")
    y = backend.compile(spectral_linear)(**t, plan=plan, singular_basis=True)
    y.sum().backward()
    assert "fastspec.spectral_linear.default" in backend.targets()


def test_other_devices_keep_the_operator(monkeypatch):
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    backend = Backend()
    backend.compile(spectral_linear)(**operands()).sum().backward()
    assert not backend.launches()
    assert "fastspec.spectral_linear.default" in backend.targets()


def test_an_exported_program_keeps_the_operator():
    class Layer(torch.nn.Module):
        def forward(self, t):
            return spectral_linear(**t)

    with torch.no_grad():
        program = torch.export.export(Layer(), (operands(dtype=torch.float32),))
    targets = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert "fastspec.spectral_linear.default" in targets


@pytest.mark.parametrize("core", ["diag", "dense"])
def test_what_is_traced_computes_the_same(core, monkeypatch):
    """ATen's calls, the ones that run without a GPU."""
    monkeypatch.setenv("FASTSPEC_BACKEND", "aten")
    t = problem(40, 24, 56, 8, core)
    want = exact(t, core)
    x, delta = t["x"].requires_grad_(), t["delta"].requires_grad_()
    factors = (t["w"], t["bias"], t["u"], torch.ones(8), t["vh"], delta)
    backend = Backend()
    plan = Plan("factored", "two_sided")
    y = backend.compile(spectral_linear)(x, *factors, core=core, plan=plan)
    y.backward(t["g"])
    assert "fastspec" not in backend.targets()
    for got, exact_result in zip((y, x.grad, delta.grad), (want[0], *want[2:]), strict=True):
        assert_close(got, exact_result)
