"""The bank of a model's tasks: switching, adding, replacing, removing, and what it refuses."""

import copy

import pytest
import torch
from support import assert_close
from tasks_support import IDS, NAMES, alone, random_values, with_tasks
from tiny_models import net
from torch import nn

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.model.targets import spectral_layers
from fastspec.multitask.bank import TaskBank


class TestSwitching:
    def test_values_are_copied_in_place(self):
        model = with_tasks()
        before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
        fastspec.set_task(model, "b")
        for name, p in model.named_parameters():
            assert before[name] == (p, p.data_ptr())
        values = random_values(model.task_bank, 1)
        assert torch.equal(model.blocks[1].down.delta, values["blocks.1.down.delta"])
        assert torch.equal(model.head.weight, values["head.weight"])

    def test_what_was_learnt_is_kept(self):
        model = with_tasks()
        for name in "ab":
            fastspec.set_task(model, name)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            model(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if name == "a":
                learnt = model(IDS)
        fastspec.set_task(model, "a")
        assert torch.equal(model(IDS), learnt)

    def test_none_is_the_pretrained_model(self):
        model = with_tasks()
        fastspec.set_task(model, "b")
        fastspec.set_task(model, None)
        assert torch.equal(model(IDS), net()(IDS))
        assert model.task_bank.active is None

    def test_a_new_task_starts_as_the_pretrained_model(self):
        model = with_tasks()
        fastspec.set_task(model, "a")
        fastspec.add_task(model, "fresh")
        fastspec.set_task(model, "fresh")
        assert torch.equal(model(IDS), net()(IDS))

    def test_values_of_no_task_are_not_lost(self):
        model = spectralize(net(), SpectralConfig(rank=4))
        with torch.no_grad():
            model.blocks[0].up.delta.add_(1.0)
        learnt = model(IDS)
        fastspec.add_task(model, "other")
        with pytest.raises(ValueError, match=r"no task.*current=True"):
            fastspec.set_task(model, "other")
        fastspec.add_task(model, "mine", current=True)
        assert model.task_bank.active == "mine"
        fastspec.set_task(model, "other")
        fastspec.set_task(model, "mine")
        assert torch.equal(model(IDS), learnt)

    @pytest.mark.parametrize("option", ["train_bias", "train_layernorm"])
    def test_biases_and_norms_switch_too(self, option):
        model = with_tasks(**{option: True})
        fastspec.set_task(model, "a")
        learnt = model(IDS)
        fastspec.set_task(model, None)
        assert torch.equal(model(IDS), net()(IDS))
        fastspec.set_task(model, "a")
        assert torch.equal(model(IDS), learnt)

    def test_norms_mix_and_biases_do_not(self):
        model = with_tasks(train_layernorm=True)
        mixed = model(IDS, tasks=NAMES)
        assert_close(mixed, alone(model, NAMES, IDS))
        assert torch.equal(mixed[1], net()(IDS)[1])
        model = with_tasks(train_bias=True)
        with pytest.raises(ValueError, match=r"can't be mixed.*set_task"):
            model(IDS, tasks=NAMES)
        with pytest.raises(ValueError, match="can't be mixed"):
            model.task_bank.requires_grad_()


class TestLife:
    def test_list_replace_remove(self):
        model = with_tasks()
        assert fastspec.list_tasks(model) == ["a", "b", "c"]
        assert fastspec.list_tasks(net()) == []
        y = model(IDS, tasks=NAMES)
        bank = model.task_bank
        fastspec.replace_task(model, "a", random_values(bank, 9))
        changed = model(IDS, tasks=NAMES)
        rows = torch.tensor([name == "a" for name in NAMES])
        assert torch.equal(changed[~rows], y[~rows])
        assert not torch.equal(changed[rows], y[rows])
        fastspec.remove_task(model, "b")
        assert fastspec.list_tasks(model) == ["a", "c"]
        with pytest.raises(ValueError, match=r"no task 'b'.*'a', 'c'"):
            model(IDS, tasks=NAMES)
        fastspec.add_task(model, "b", random_values(bank, 1))
        assert torch.equal(model(IDS, tasks=NAMES), changed)

    def test_replacing_and_removing_the_active_task(self):
        model = with_tasks()
        fastspec.set_task(model, "a")
        fastspec.replace_task(model, "a", random_values(model.task_bank, 1))
        replaced = model(IDS)
        fastspec.set_task(model, "b")  # seed 1
        assert torch.equal(model(IDS), replaced)
        fastspec.remove_task(model, "b")
        assert model.task_bank.active is None
        assert torch.equal(model(IDS), net()(IDS))

    def test_tables_double_and_keep_their_values(self):
        model = spectralize(net(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model, capacity=2)
        outputs = []
        for i in range(9):
            fastspec.add_task(model, f"t{i}", random_values(bank, i))
            outputs.append(model(IDS[:1], tasks=[f"t{i}"]))
            assert bank.capacity == max(2, 1 << i.bit_length())
        for i, y in enumerate(outputs):
            assert torch.equal(model(IDS[:1], tasks=[f"t{i}"]), y)

    def test_below_the_capacity_nothing_is_allocated(self):
        model = spectralize(net(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model, capacity=4)
        places = [slot.table.data_ptr() for slot in bank.slots]
        for i in range(4):
            fastspec.add_task(model, f"t{i}", random_values(bank, i))
        fastspec.remove_task(model, "t2")
        fastspec.replace_task(model, "t0", random_values(bank, 7))
        fastspec.add_task(model, "t9")
        fastspec.set_task(model, "t9")
        assert [slot.table.data_ptr() for slot in bank.slots] == places
        assert fastspec.task_bank(model, capacity=100) is bank
        assert bank.capacity == 128

    def test_the_state_dict_and_the_parameters_stay_the_models_own(self):
        model, other = with_tasks(), spectralize(net(), SpectralConfig(rank=4))
        assert model.state_dict().keys() == other.state_dict().keys()
        assert dict(model.named_parameters()).keys() == dict(other.named_parameters()).keys()
        assert model.load_state_dict(other.state_dict()) == ([], [])

    def test_deepcopy_and_casts(self):
        model = with_tasks()
        y = model(IDS, tasks=NAMES)
        clone = copy.deepcopy(model)
        fastspec.replace_task(model, "a", {})
        assert torch.equal(clone(IDS, tasks=NAMES), y)
        assert clone.task_bank.model is clone
        fastspec.set_task(clone, "b")
        clone.bfloat16()
        assert all(layer.delta_table.dtype == torch.float32 for _, layer in spectral_layers(clone))
        assert_close(clone(IDS, tasks=NAMES), y, torch.bfloat16)
        fastspec.set_task(clone, None)
        fastspec.set_task(clone, "c")
        assert_close(clone(IDS), model(IDS, tasks=["c"] * 5), torch.bfloat16)

    def test_tasks_added_in_inference_mode_can_be_changed_outside(self):
        model = spectralize(net(), SpectralConfig(rank=4))
        with torch.inference_mode():
            fastspec.add_task(model, "a", random_values(fastspec.task_bank(model), 0))
            y = model(IDS, tasks=["a"] * 5)
        fastspec.add_task(model, "b", random_values(model.task_bank, 0))
        assert torch.equal(model(IDS, tasks=["b"] * 5), y)


class TestValues:
    def test_what_does_not_fit_is_refused(self):
        model = with_tasks()
        y = model(IDS, tasks=NAMES)
        for values, message in (
            (
                {"blocks.0.up.delta": torch.zeros(5)},
                r"blocks\.0\.up\.delta must be \[4\], got \[5\]",
            ),
            ({"blocks.9.up.delta": torch.zeros(4)}, r"no tensor 'blocks\.9\.up\.delta'"),
            ({"head.weight": torch.zeros(4, 9)}, r"head\.weight must be \[4, 16\], got \[4, 9\]"),
            ({"head.weight": torch.zeros(4, 16)}, r"head\.bias must be \[4\], got \[3\]"),
        ):
            with pytest.raises(ValueError, match=message):
                fastspec.add_task(model, "new", values)
            with pytest.raises(ValueError, match=message):
                fastspec.replace_task(model, "a", values)
        with pytest.raises(ValueError, match="'a' is there already"):
            fastspec.add_task(model, "a")
        for name in ("", None, 3):
            with pytest.raises(ValueError, match="name must be a string"):
                fastspec.add_task(model, name)
        with pytest.raises(ValueError, match="without a source"):
            fastspec.add_task(model, "new", {}, current=True)
        assert fastspec.list_tasks(model) == ["a", "b", "c"]
        assert torch.equal(model(IDS, tasks=NAMES), y)

    def test_a_bank_needs_room(self):
        with pytest.raises(ValueError, match="capacity must be at least 1"):
            TaskBank(spectralize(net(), SpectralConfig(rank=4)), capacity=0)

    def test_trained_norms_make_no_pretrained_ones(self):
        model = spectralize(net(), SpectralConfig(rank=4, train_layernorm=True))
        nn.init.ones_(model.blocks[0].up.delta)
        with pytest.raises(ValueError, match="not known any more"):
            fastspec.add_task(model, "a")

    def test_printing(self):
        text = repr(with_tasks().task_bank)
        assert "3 tasks, capacity=8, active=None" in text
        assert "MiB" in text
