"""What surrounds a captured training step: the capture here runs the step, as a replay would."""

import copy

import pytest
import torch
from tiny_models import IDS, Net
from torch import nn

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.model import graphed as module

BATCHES = [torch.roll(IDS, i, 1) for i in range(6)]


class Moving(Net):
    """With statistics that its training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        self.seen += 1
        return super().forward(ids)


def adapted():
    torch.manual_seed(0)
    return spectralize(Moving(), SpectralConfig(rank=4)).train()


def optimizer_of(model, kind=torch.optim.AdamW, **options):
    return kind(fastspec.parameter_groups(model, 3e-2, head_lr=1e-3), **options)


def loss(model, batch):
    return model(batch["ids"]).square().mean()


@pytest.fixture
def captured(monkeypatch):
    """Captures that were made; a step is run as often as before a real one, and its replays run it."""
    steps = []

    def capture(step):
        for _ in range(module.WARMUP):
            step()
        steps.append(step)
        value = torch.zeros(())

        def replay():  # writes over its parameters without PyTorch's counting it
            return value.copy_(step())

        return replay

    monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    return steps


def by_hand(model, optimizer, batches, scheduler=None):
    losses = []
    for ids in batches:
        value = loss(model, {"ids": ids})
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.item())
    return losses


def trained(model):
    return {n: p.detach().clone() for n, p in model.state_dict().items()}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("after", [0, 2])
def test_it_trains_as_a_loop_does(captured, kind, after):
    """Also where the optimiser has state already."""
    model, plain = adapted(), adapted()
    optimizer, other = (optimizer_of(m, kind, capturable=False) for m in (model, plain))
    by_hand(model, optimizer, BATCHES[:after])
    by_hand(plain, other, BATCHES[:after])
    for group in optimizer.param_groups:
        group["capturable"] = True
    with pytest.MonkeyPatch.context() as patch:  # PyTorch has no capturable optimisers on a CPU
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        step = fastspec.graphed(model, optimizer, {"ids": IDS}, loss)
        got = [step(ids=ids).item() for ids in BATCHES]
    assert len(captured) == 1
    assert got == pytest.approx(by_hand(plain, other, BATCHES), rel=1e-5)
    for (name, a), b in zip(trained(model).items(), trained(plain).values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_schedule_reaches_it(captured):
    model, plain = adapted(), adapted()
    optimizer, other = (optimizer_of(m, torch.optim.SGD, momentum=0.9) for m in (model, plain))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, other)]
    step = fastspec.graphed(model, optimizer, {"ids": IDS}, loss)
    got = []
    for ids in BATCHES:
        got.append(step(ids=ids).item())
        schedules[0].step()
    assert got == pytest.approx(by_hand(plain, other, BATCHES, schedules[1]), rel=1e-5)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    assert rates == pytest.approx([group["lr"] for group in other.param_groups])
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)


def test_capturing_leaves_everything_as_it_was(captured):
    model = adapted()
    optimizer = optimizer_of(model, torch.optim.SGD, momentum=0.9)
    before = copy.deepcopy(trained(model))
    fastspec.graphed(model, optimizer, {"ids": IDS}, loss)
    for name, value in trained(model).items():
        assert torch.equal(value, before[name]), name
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert momenta
    assert not any(m.any() for m in momenta)
    assert all(p.grad is None for p in model.parameters())


def test_kept_copies_see_what_a_replay_wrote(captured):
    model = fastspec.keep_merged(adapted())
    step = fastspec.graphed(model, optimizer_of(model, torch.optim.SGD), {"ids": IDS}, loss)
    versions = {n: p._version for n, p in model.named_parameters() if p.requires_grad}
    step(ids=IDS)
    assert all(p._version > versions[n] for n, p in model.named_parameters() if n in versions)
    kept = model.eval()(IDS)
    fastspec.keep_merged(model, False)
    torch.testing.assert_close(kept, model(IDS))


def test_on_a_cpu_the_step_runs_as_it_is():
    model, plain = adapted(), adapted()
    optimizer, other = (optimizer_of(m) for m in (model, plain))
    step = fastspec.graphed(model, optimizer, {"ids": IDS}, loss)
    got = [step(ids=ids).item() for ids in BATCHES]
    assert got == by_hand(plain, other, BATCHES)


def test_the_example_is_not_written_over():
    model, ids = adapted(), IDS.clone()
    step = fastspec.graphed(model, optimizer_of(model), {"ids": ids}, loss)
    step(ids=BATCHES[1])
    assert torch.equal(ids, IDS)


def test_refusals(captured):
    model = adapted()
    before = trained(model)
    with pytest.raises(ValueError, match=r"AdamW counts its steps on the host.*capturable=True"):
        fastspec.graphed(model, optimizer_of(model), {"ids": IDS}, loss)
    optimizer = optimizer_of(model, torch.optim.SGD)
    step = fastspec.graphed(model, optimizer, {"ids": IDS}, loss)
    with pytest.raises(
        ValueError, match=r"a batch of \['ids'\] was captured, got \['ids', 'mask'\]"
    ):
        step(ids=IDS, mask=IDS)
    with pytest.raises(ValueError, match=r"ids must be \[2, 11\] .* got \[1, 11\].*pad it"):
        step(ids=IDS[:1])
    with pytest.raises(ValueError, match=r"got \[2, 11\] in torch.int32"):
        step(ids=IDS.int())
    assert all(torch.equal(t, before[n]) for n, t in trained(model).items())
    with pytest.raises(ValueError, match=r"on one device, and is on \['cpu', 'meta'\]"):
        fastspec.graphed(
            nn.ModuleList([model, nn.Linear(2, 2, device="meta")]), optimizer, {}, loss
        )


def test_what_is_no_tensor_is_named(captured):
    model = adapted()
    optimizer = optimizer_of(model, torch.optim.SGD)
    for example in ((IDS,), {"ids": IDS, "mask": None}):
        with pytest.raises(TypeError, match="example must map names to tensors"):
            fastspec.graphed(model, optimizer, example, loss)
    with pytest.raises(TypeError, match=r"the model's loss must be a tensor, got None"):
        fastspec.graphed(model, optimizer, {"ids": IDS}, lambda model, batch: None)
    step = fastspec.graphed(model, optimizer, {"ids": IDS}, loss)
    with pytest.raises(TypeError, match="ids must be a tensor, got None"):
        step(ids=None)
