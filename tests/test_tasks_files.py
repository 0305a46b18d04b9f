"""Adapter folders as tasks: many at once, all or none; heads of other sizes."""

import pytest
import tiny_models
import torch
from support import assert_close, assert_unchanged, frozen_state, little_memory, rewrite
from tiny_models import IDS, net
from torch import nn

import fastspec
from fastspec import SpectralConfig, load_tasks, save_adapter, spectralize
from fastspec.fingerprint import tensor_fingerprint
from fastspec.model import base
from fastspec.model.adapter import AdapterError


def trained(seed, labels=3, **options):
    config = SpectralConfig(**{"rank": 4, **options})
    return tiny_models.trained(config, seed, 0.3, labels=labels)


@pytest.fixture
def runs(tmp_path):
    """Three folders, one of them with a wider head, and what does not belong."""
    for seed, labels in enumerate((3, 5, 3)):
        save_adapter(trained(seed, labels), tmp_path / "runs" / f"t{seed}")
    (tmp_path / "runs" / "notes.txt").write_text("no adapter")
    (tmp_path / "runs" / "empty").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_folders_become_tasks(runs, adapted):
    model = net()
    if adapted:
        spectralize(model, SpectralConfig(rank=4))
    bank = load_tasks(model, runs / "*")
    assert fastspec.list_tasks(model) == list(bank) == ["t0", "t1", "t2"]
    for seed, labels in enumerate((3, 5, 3)):
        want = trained(seed, labels)(IDS)
        assert_close(model(IDS, tasks=[f"t{seed}"] * 2)[..., :labels], want)
        fastspec.set_task(model, f"t{seed}")
        assert torch.equal(model(IDS), want)
    fastspec.set_task(model, None)
    assert torch.equal(model(IDS), net()(IDS))


def test_a_task_is_saved_as_any_adapter(runs, tmp_path):
    model = net()
    load_tasks(model, runs / "*")
    fastspec.set_task(model, "t1")
    save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (
        runs / "t1" / "adapter.safetensors"
    ).read_bytes()


def test_one_folder(runs):
    model = net()
    fastspec.add_task(model, "one", runs / "t0")
    fastspec.add_task(model, "two", runs / "t1")
    y = model(IDS, tasks=["one", "two"])
    fastspec.replace_task(model, "one", runs / "t2")
    other = model(IDS, tasks=["one", "two"])
    assert torch.equal(other[1], y[1])
    assert_close(other[:1, ..., :3], trained(2)(IDS)[:1])


@pytest.mark.parametrize("name", ["run [1]", "a*b", "what?", "[", "**"])
def test_characters_of_patterns_in_the_names_of_folders(runs, monkeypatch, name):
    odd = runs.rename(runs.parent / name)
    for other in ("run 1", "a-b", "whats"):  # which the same characters match as a pattern
        save_adapter(trained(7), runs.parent / other / "t7")
    (odd / "t1").rename(odd / "t [1]")
    assert list(load_tasks(net(), odd / "*")) == ["t [1]", "t0", "t2"]
    assert list(load_tasks(net(), f"{odd}/t?")) == ["t0", "t2"]
    assert list(load_tasks(net(), odd / "t [1]")) == ["t [1]"]
    monkeypatch.chdir(odd.parent)
    assert list(load_tasks(net(), f"{name}/t*")) == ["t [1]", "t0", "t2"]
    with pytest.raises(FileNotFoundError, match="no adapter folder there"):
        load_tasks(net(), odd / "nothing [1]")


def test_names(runs, tmp_path):
    bank = load_tasks(net(), runs / "*", name=lambda folder: folder.name.upper())
    assert list(bank) == ["T0", "T1", "T2"]
    save_adapter(trained(3), tmp_path / "elsewhere" / "t0")
    twice = [runs / "t0", tmp_path / "elsewhere" / "t0"]
    with pytest.raises(ValueError, match=r"two .* named 't0'.*folder\.parent\.name"):
        load_tasks(net(), twice)
    bank = load_tasks(net(), twice, name=lambda folder: f"{folder.parent.name}/{folder.name}")
    assert list(bank) == ["runs/t0", "elsewhere/t0"]
    model = net()
    load_tasks(model, [runs / "t0"])
    with pytest.raises(ValueError, match="'t0' is there already"):
        load_tasks(model, runs / "*")


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_names_are_checked_before_anything(runs, adapted, monkeypatch):
    model = net()
    if adapted:
        spectralize(model, SpectralConfig(rank=4))
    before = frozen_state(model, IDS)
    monkeypatch.chdir(runs / "t0")  # Path(".").name is empty
    for call in (
        lambda: load_tasks(model, ["."]),
        lambda: load_tasks(model, [runs / "t0"], name=lambda folder: None),
        lambda: fastspec.add_task(model, "", runs / "t0"),
        lambda: fastspec.add_task(model, 3, runs / "t0"),
        lambda: fastspec.add_task(model, ""),
        lambda: fastspec.add_task(model, "", current=True),
    ):
        with pytest.raises(ValueError, match="name must be a string that is not empty"):
            call()
        assert_unchanged(model, before, IDS)


def refused(folders, message, error=AdapterError):
    """Refused by a plain model and by one with tasks, both unchanged."""
    model = net()
    text = repr(model)
    with pytest.raises(error, match=message):
        load_tasks(model, folders)
    assert repr(model) == text
    assert not hasattr(model, "task_bank")
    model = spectralize(net(), SpectralConfig(rank=4))
    fastspec.add_task(model, "there")
    y = model(IDS, tasks=["there", None])
    with pytest.raises(error, match=message):
        load_tasks(model, folders)
    assert fastspec.list_tasks(model) == ["there"]
    assert torch.equal(model(IDS, tasks=["there", None]), y)


class TestAllOrNone:
    def test_damaged(self, runs):
        path = runs / "t2" / "adapter.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        refused(runs / "*", "t2.*truncated")

    def test_other_base_weights(self, runs):
        other = spectralize(net(seed=1), SpectralConfig(rank=4))
        save_adapter(other, runs / "t9")
        refused(runs / "*", "t9.*other base weights")

    def test_another_rank_or_core(self, runs):
        save_adapter(trained(0, rank=5), runs / "t9")
        refused(runs / "*", r"t9: .*(delta is \[5\].*expects \[4\]|rank 5 .* 4 in the model)")
        save_adapter(trained(0, core="dense"), runs / "t9")
        refused(runs / "*", "t9: .*core: the adapter has 'dense', the model 'diag'")

    def test_a_head_that_disagrees_in_its_size(self, runs):
        rewrite(runs / "t1", lambda t: t.update({"head.bias": torch.zeros(4)}))
        refused(runs / "*", "t1: the tensors of head are not of one size")

    def test_a_head_of_another_width(self, runs):
        model = net()
        model.head = nn.Linear(7, 3)
        with pytest.raises(AdapterError, match=r"head\.weight is \[3, 16\].*expects \[3, 7\]"):
            load_tasks(model, runs / "*")

    def test_a_head_that_would_fill_the_memory(self, runs):
        """10,000 rows are 680 KB in one folder, and 700 MB in the tables of 1,024 tasks."""
        save_adapter(trained(0, labels=10_000), runs / "wide")
        with little_memory():
            for model in (net(), spectralize(net(), SpectralConfig(rank=4))):
                before = frozen_state(model, IDS)
                with pytest.raises(
                    ValueError, match=r"8 tasks would take 5 MB.*max_bytes=1,000,000"
                ):
                    load_tasks(model, runs / "*", max_bytes=10**6)
                assert_unchanged(model, before, IDS)
            model = spectralize(net(), SpectralConfig(rank=4))
            bank = fastspec.task_bank(model, 1024, max_bytes=10**8)
            fastspec.add_task(model, "there")
            before = frozen_state(model, IDS)
            for refuse in (
                lambda: load_tasks(model, runs / "*"),
                lambda: fastspec.add_task(model, "wide", runs / "wide"),
                lambda: fastspec.replace_task(model, "there", runs / "wide"),
                lambda: bank.reserve(10**6),
            ):
                with pytest.raises(ValueError, match=r"tasks would take .* MB, above max_bytes"):
                    refuse()
                assert_unchanged(model, before, IDS)
                assert list(bank) == ["there"]
                assert bank.capacity == 1024
        # the same head where there is room for few
        bank = load_tasks(net(), runs / "*")
        assert bank.model(IDS, tasks=["wide", "t0"]).shape == (2, 11, 10_000)
        with pytest.raises(ValueError, match="max_bytes=100:"):
            fastspec.task_bank(spectralize(net(), SpectralConfig(rank=4)), max_bytes=100)

    def test_memory_that_runs_out_on_the_way(self, runs, monkeypatch):
        model = spectralize(net(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model)
        before, made = frozen_state(model, IDS), []

        def new_table(slot, shape):
            made.append(slot)
            if len(made) == len(bank.slots):
                raise MemoryError
            return torch.zeros(shape)

        monkeypatch.setattr("fastspec.multitask.tables.Slot.new_table", new_table)
        with pytest.raises(MemoryError):
            bank.reserve(100)
        assert_unchanged(model, before, IDS)

    def test_nothing_there(self, tmp_path):
        refused(tmp_path / "*", "no adapter folder there", FileNotFoundError)
        refused([tmp_path / "nowhere"], "no such file", FileNotFoundError)
        refused([], "folders is empty", ValueError)


def test_many_folders(tmp_path, monkeypatch):
    """The base weights, what takes the time, are fingerprinted once for all of them."""
    model = trained(0)
    for i in range(20):
        model.blocks[0].up.delta.data.fill_(i / 20)
        save_adapter(model, tmp_path / f"t{i}")
    served = net()
    read = []
    monkeypatch.setattr(
        base, "tensor_fingerprint", lambda t: read.append(t) or tensor_fingerprint(t)
    )
    bank = load_tasks(served, tmp_path / "*")
    assert len(bank) == 20
    assert len(read) == len([p for n, p in net().named_parameters() if not n.startswith("head")])
    assert bank.capacity == 32
    fastspec.set_task(served, "t17")
    assert_close(served.blocks[0].up.delta.detach(), torch.full((4,), 17 / 20))
