"""What the tests of many tasks share: a small model, values for its tasks, each row by its task alone."""

import torch
from tiny_models import net

import fastspec
from fastspec import SpectralConfig, spectralize

IDS = torch.arange(55).reshape(5, 11) * 7 % 11
NAMES = ["b", None, "a", "c", "a"]


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
    model = spectralize(net(), SpectralConfig(rank=4, core=core, **options))
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
