"""What the tests of many tasks share: a small model, values for its tasks, each row by its task alone."""

import resource
from contextlib import contextmanager

import torch
from test_convert import Net

import fastspec
from fastspec import SpectralConfig, spectralize

IDS = torch.arange(55).reshape(5, 11) * 7 % 11
NAMES = ["b", None, "a", "c", "a"]


def plain():
    torch.manual_seed(0)
    return Net().eval()


def random_values(bank, seed, scale=0.3, labels=None):
    """Values for every tensor of a task; `labels` sets the size of the head."""
    g = torch.Generator().manual_seed(seed)
    values = {}
    for slot in bank.slots:
        shape = slot.pretrained.shape
        if slot.is_output and labels is not None:
            shape = (labels, *shape[1:])
        values[slot.name] = scale * torch.randn(*shape, generator=g)
    return values


def with_tasks(core="diag", names="abc", **options):
    model = spectralize(plain(), SpectralConfig(rank=4, core=core, **options))
    for seed, name in enumerate(names):
        bank = fastspec.task_bank(model)
        fastspec.add_task(model, name, random_values(bank, seed))
    return model


def alone(model, names, ids):
    """Each row by itself, with its own task in the model's parameters."""
    rows = []
    before = model.task_bank.active
    for name, row in zip(names, ids, strict=True):
        fastspec.set_task(model, name)
        rows.append(model(row[None]))
    fastspec.set_task(model, before)
    return torch.cat(rows)


def frozen_state(model):
    """All that a refused call must leave as it was: tensors, modules, hooks, attributes and an output."""
    tensors = {
        name: (t, t.requires_grad, t.detach().clone())
        for named in (model.named_parameters(), model.named_buffers())
        for name, t in named
    }
    hooks = {
        name: [(kind, *value) for kind, value in sorted(vars(m).items()) if kind.endswith("_hooks")]
        for name, m in model.named_modules()
    }
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        y = model(IDS)
    return repr(model), attributes, hooks, tensors, y


def assert_unchanged(model, before):
    text, attributes, hooks, tensors, y = before
    after = frozen_state(model)
    assert after[:3] == (text, attributes, hooks)
    assert after[3].keys() == tensors.keys()
    for name, (tensor, flag, value) in tensors.items():
        assert after[3][name][0] is tensor, name
        assert after[3][name][1] == flag, name
        assert torch.equal(after[3][name][2], value), name
    assert torch.equal(after[4], y)


@contextmanager
def little_memory(megabytes=192):
    """Let no more than this be allocated on top of what is there; a breach is a MemoryError."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
