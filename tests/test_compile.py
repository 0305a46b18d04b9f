"""torch.compile and torch.export of adapted transformers: one graph, eager's numbers, no recompilation."""

import pytest
import torch
from support import assert_close
from tiny_models import NO_DROPOUT, bert, gpt2, llama
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import fastspec
from fastspec import SpectralConfig, load_adapter, save_adapter, spectralize
from fastspec.model.targets import spectral_layers

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).reshape(2, 12) % 50


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama}
LAYERS = {"bert": "num_hidden_layers", "gpt2": "n_layer", "llama": "num_hidden_layers"}


def adapted(name, core="diag", layers=2, **options):
    """In train mode, without dropout."""
    model = MODELS[name](**NO_DROPOUT[name], **{LAYERS[name]: layers}).train()
    spectralize(model, SpectralConfig(rank=4, core=core, **options))
    shift(model, 0.05)
    return model


def shift(model, by):
    """Another task: new values in the tensors that are there."""
    with torch.no_grad():
        for _, layer in spectral_layers(model):
            layer.delta.add_(by)


def values(model):
    """Values for a task of its own, by name."""
    g = torch.Generator().manual_seed(7)
    return {
        f"{name}.delta": 0.1 * torch.randn(layer.delta.shape, generator=g)
        for name, layer in spectral_layers(model)
    }


def gradients(model, y):
    return torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])


CORES = {"bert": "diag", "gpt2": "dense", "llama": "band"}


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_and_the_gradients_of_eager(name):
    model = adapted(name, CORES[name])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        y, want = compiled(IDS).logits, model(IDS).logits
        assert_close(y, want)
        for a, b in zip(gradients(model, y), gradients(model, want), strict=True):
            assert_close(a, b)
        shift(model, 0.1)
    assert counter.frame_count == 1, "other coefficients must not compile again"


def test_batches_of_any_size_share_a_graph():
    model = adapted("bert")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for n in (4, 3, 17, 64, 256):  # the cost model's choice differs along these
        ids = torch.arange(12 * n).reshape(n, 12) % 50
        assert_close(compiled(ids).logits, model(ids).logits)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 5


def test_switching_tasks_does_not_compile_again(tmp_path):
    model = adapted("bert")
    save_adapter(model, tmp_path)
    fastspec.add_task(model, "a", current=True)
    fastspec.add_task(model, "b", values(model))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = []
    for task in ("a", "b", None, "a"):
        fastspec.set_task(model, task)
        seen.append(compiled(IDS).logits.detach())
        assert_close(seen[-1], model(IDS).logits)
    load_adapter(model, tmp_path)
    assert torch.equal(compiled(IDS).logits, seen[0])
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(seen[0], seen[3])
    assert counter.frame_count == 1


def test_inductor():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    model = spectralize(net, SpectralConfig(rank=4))
    shift(model, 0.1)
    x = torch.randn(8, 16)
    y, want = torch.compile(model, fullgraph=True)(x), model(x)
    assert_close(y, want)
    for a, b in zip(gradients(model, y), gradients(model, want), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_inductor_of_transformers(name):
    """Compiled for good, once for every task."""
    torch._dynamo.reset()
    model = adapted(name, CORES[name], layers=1).eval()
    fastspec.add_task(model, "a", current=True)
    fastspec.add_task(model, "b", values(model))
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    seen = []
    with torch.no_grad():
        for task in ("a", "b", None, "a"):
            fastspec.set_task(model, task)
            seen.append(
                compiled(IDS, use_cache=False).logits if name != "bert" else compiled(IDS).logits
            )
            assert_close(seen[-1], model(IDS).logits)
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(seen[0], seen[3])
    assert counter.frame_count == 1


class Logits(torch.nn.Module):
    """Tensors in, tensors out, as an exported program has it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, tasks=None):
        options = (
            {} if isinstance(self.model, transformers.BertPreTrainedModel) else {"use_cache": False}
        )
        if tasks is not None:
            options["tasks"] = tasks
        return self.model(input_ids=ids, attention_mask=mask, **options).logits


def export(model, *inputs):
    """A program of any batch and length (the tasks of any batch)."""
    sizes = {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=16)}
    shapes = [{d: sizes[d] for d in range(x.dim())} for x in inputs]
    return torch.export.export(Logits(model), inputs, dynamic_shapes=tuple(shapes)).module()


OTHER = torch.arange(30).reshape(5, 6) % 50


@pytest.mark.parametrize(("name", "merged"), [("bert", True), ("gpt2", False), ("llama", True)])
def test_export(name, merged):
    model = adapted(name).eval()
    want = Logits(model)(OTHER, torch.ones_like(OTHER))
    if merged:
        fastspec.merge(model)
    program = export(model, IDS, torch.ones_like(IDS))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("fastspec.spectral_linear.default" in targets) != merged
    assert_close(program(OTHER, torch.ones_like(OTHER)), want)


def test_export_with_a_task_input():
    model = adapted("bert").eval()
    fastspec.add_task(model, "a", current=True)
    bank = fastspec.add_task(model, "b", values(model))
    with torch.no_grad():
        model(
            IDS, tasks=["a", "b"]
        )  # whose rows are where is found out in a call with different tasks
        rows = bank.index(["a", "b"])
        program = export(model, IDS, torch.ones_like(IDS), rows)
        for names in (["a", "b", None, "b", "a"], ["b"] * 5):
            got = program(OTHER, torch.ones_like(OTHER), bank.index(names))
            assert_close(got, model(OTHER, tasks=names).logits)
