"""Fixtures of all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers whatever ran before: a sum that cancels would fail one run in a hundred."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models: matrices this small only lose by being shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake(monkeypatch):
    """Runs of `glue_support.ROWS` that take no time and know their score."""
    from glue_support import instant_run

    from fastspec.studies.glue import processes

    monkeypatch.setattr(processes, "command", instant_run)
