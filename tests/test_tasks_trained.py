"""Tables that are trained together are parameters of the model: for clipping, DDP, optimisers and saving."""

import copy

import pytest
import torch
from support import assert_close
from tasks_support import IDS, NAMES, random_values, with_tasks
from tiny_models import net
from torch import nn

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.model.targets import spectral_layers


def loss_of(model, names=NAMES):
    return model(IDS, tasks=names).square().mean()


def others(model):
    """What the tables hold of the tasks that `NAMES` does not name."""
    bank = model.task_bank
    place = int(bank.places(bank.index(["d"])))
    return [slot.table[place].detach().clone() for slot in bank.slots]


class TestParameters:
    def test_the_model_sees_them_while_they_are_trained(self):
        model = with_tasks()
        before = dict(model.named_parameters())
        trainable = {n for n, p in before.items() if p.requires_grad}
        bank = model.task_bank.requires_grad_()
        loss_of(model).backward()
        seen = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in seen} == {id(p) for p in bank.parameters()}
        total = torch.stack([p.grad.norm() for p in bank.parameters()]).norm()
        assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e-3), total)
        assert_close(
            torch.stack([p.grad.norm() for p in bank.parameters()]).norm(), torch.tensor(1e-3)
        )
        model.zero_grad()
        assert all(p.grad is None for p in bank.parameters())
        loss_of(model).backward()
        bank.requires_grad_(False)
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[n] is p for n, p in before.items())
        assert {n for n, p in after.items() if p.requires_grad} == trainable
        assert all(p.grad is None and not p.requires_grad for p in bank.parameters())

    def test_the_same_tensors_come_back_to_be_trained_again(self):
        model = with_tasks()
        bank = model.task_bank.requires_grad_()
        tables = bank.parameters()
        optimizer = torch.optim.Adam(tables, lr=0.1)
        loss_of(model).backward()
        optimizer.step()
        bank.requires_grad_(False)
        fastspec.set_task(model, "a")
        bank.requires_grad_()
        assert all(a is b for a, b in zip(bank.parameters(), tables, strict=True))
        y = model(IDS, tasks=NAMES)
        loss_of(model).backward()
        optimizer.step()
        assert not torch.equal(model(IDS, tasks=NAMES), y)

    def test_checkpoints_are_those_of_a_model_without_tasks(self):
        model, plain = with_tasks(), spectralize(net(), SpectralConfig(rank=4))
        model.task_bank.requires_grad_()
        state = model.state_dict()
        assert state.keys() == plain.state_dict().keys()
        assert plain.load_state_dict(state) == ([], [])
        y = model(IDS, tasks=NAMES)
        assert model.load_state_dict(plain.state_dict()) == ([], [])
        assert torch.equal(model(IDS, tasks=NAMES), y)

    def test_their_rates_are_those_of_what_they_are_tables_of(self):
        model = with_tasks(modules_to_save=["head"])
        model.task_bank.requires_grad_()
        groups = {g["name"]: g["params"] for g in fastspec.parameter_groups(model, 1e-3)}
        sizes = {name: sorted(tuple(p.shape) for p in params) for name, params in groups.items()}
        assert sizes == {"coefficients": [(8, 4)] * 4, "head": [(8, 3), (8, 3, 16)]}

    def test_casts_and_copies(self):
        model = with_tasks()
        bank = model.task_bank.requires_grad_()
        y = model(IDS, tasks=NAMES)
        clone = copy.deepcopy(model)
        for _, layer in spectral_layers(clone):
            assert any(layer.delta_table is p for p in clone.parameters())
        clone.bfloat16()
        loss_of(clone).backward()
        for slot in clone.task_bank.slots:
            assert slot.table.dtype == (torch.float32 if slot.leaf == "delta" else torch.bfloat16)
            assert slot.table.grad.any()
        assert_close(clone(IDS, tasks=NAMES), y, torch.bfloat16)
        assert all(p.grad is None for p in bank.parameters())
        clone.task_bank.requires_grad_(False)
        assert "task_tables" not in dict(clone.named_children())

    def test_an_adapter_is_not_saved_with_tables_in_it(self, tmp_path):
        model = with_tasks()
        bank = model.task_bank.requires_grad_()
        with pytest.raises(ValueError, match="is trainable but no part of the adapter"):
            fastspec.save_adapter(model, tmp_path / "a")
        bank.requires_grad_(False)
        fastspec.set_task(model, "a")
        fastspec.save_adapter(model, tmp_path / "a")
        loaded = fastspec.load_adapter(net(), tmp_path / "a")
        assert torch.equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize(
    "make",
    [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)],
    ids=["adam", "momentum"],
)
class TestTasksThatComeAndGo:
    def trained(self, make):
        model = with_tasks(names="abcd")
        bank = model.task_bank.requires_grad_()
        optimizer = make(bank.parameters(), lr=0.05)
        for names in (["a", "b", "c", "d", "d"], NAMES):
            optimizer.zero_grad()
            loss_of(model, names).backward()
            optimizer.step()
        return model, optimizer

    def step(self, model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    def test_momentum_moves_tasks_that_a_batch_does_not_name(self, make):
        """What the documentation says: the next tests would say nothing without it."""
        model, optimizer = self.trained(make)
        before = others(model)
        self.step(model, optimizer)
        assert not any(map(torch.equal, others(model), before))

    @pytest.mark.parametrize("change", ["replaced", "removed and added", "after training"])
    def test_a_new_task_has_no_momentum_of_the_former_one(self, make, change):
        model, optimizer = self.trained(make)
        values = random_values(model.task_bank, 11)
        if change == "after training":
            model.task_bank.requires_grad_(False)
        if change == "replaced":
            fastspec.replace_task(model, "d", values)
        else:
            fastspec.remove_task(model, "d")
            fastspec.add_task(model, "d", values)
        model.task_bank.requires_grad_()
        before = others(model)
        self.step(model, optimizer)
        assert all(map(torch.equal, others(model), before))
        assert torch.equal(before[0], values[model.task_bank.slots[0].name])

    def test_an_optimizer_of_former_tables_is_refused(self, make):
        model, optimizer = self.trained(make)
        unused = make(model.task_bank.parameters(), lr=0.05)
        with pytest.raises(ValueError, match="being trained and have no room for 9"):
            model.task_bank.add({f"t{i}": {} for i in range(5)})
        model.task_bank.requires_grad_(False)
        fastspec.task_bank(model, capacity=9)
        model.task_bank.requires_grad_()
        loss_of(model).backward()
        for former in (optimizer, unused):
            with pytest.raises(ValueError, match=r"replaced since.*make a new one"):
                former.step()
        new = make(model.task_bank.parameters(), lr=0.05)
        y = model(IDS, tasks=NAMES)
        new.step()
        assert not torch.equal(model(IDS, tasks=NAMES), y)


def test_a_state_that_is_not_told_apart_by_task_is_refused():
    model = with_tasks("dense", names="abcd")
    bank = model.task_bank.requires_grad_()
    optimizer = torch.optim.Adafactor(bank.parameters())
    loss_of(model).backward()
    optimizer.step()
    for change in (
        lambda: fastspec.add_task(model, "new"),
        lambda: fastspec.remove_task(model, "a"),
        lambda: fastspec.replace_task(model, "a", {}),
    ):
        with pytest.raises(ValueError, match=r"can't be told apart by task.*delete it"):
            change()
    assert fastspec.list_tasks(model) == ["a", "b", "c", "d"]
    del optimizer
    fastspec.add_task(model, "new")


def _rank(rank, file, results):
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    model = with_tasks()
    bank = model.task_bank.requires_grad_()
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(0.01 * rank)  # DDP begins with those of rank 0
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(IDS[rows], tasks=NAMES[rows]).square().mean().backward()
        optimizer.step()
    results[rank] = [p.detach().clone().tolist() for p in bank.parameters()]
    del parallel
    torch.distributed.destroy_process_group()


def test_processes_stay_together(tmp_path):
    """Two processes of DDP, each with rows of its own, against one with all of them."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), results), nprocs=2)
        first, second = results[0], results[1]
    assert first == second
    model = with_tasks()
    bank = model.task_bank.requires_grad_()
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS[:4], tasks=NAMES[:4]).square().mean().backward()
        optimizer.step()
    for got, want in zip(first, bank.parameters(), strict=True):
        assert_close(torch.tensor(got), want.detach())
