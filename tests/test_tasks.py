"""Many tasks on one model: mixed batches against each task alone, the life of a task, training together."""

import copy
import threading

import pytest
import torch
from support import assert_close
from test_convert import Block, Net
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.bank import TaskBank
from fastspec.config import CORES
from fastspec.targets import spectral_layers

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


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("core", CORES)
class TestMixedBatches:
    def test_every_row_is_its_task_alone(self, core, path):
        model = with_tasks(core, path=path)
        want = alone(model, NAMES, IDS)
        assert_close(model(IDS, tasks=NAMES), want)
        with fastspec.tasks(NAMES):
            assert torch.equal(model(IDS), model(IDS, tasks=NAMES))
        order = [4, 2, 0, 1, 3]
        shuffled = model(IDS[order], tasks=[NAMES[i] for i in order])
        assert_close(shuffled, want[order])

    def test_against_float64(self, core, path):
        model = with_tasks(core, path=path)
        wide = copy.deepcopy(model).double()
        for _, layer in spectral_layers(wide):
            layer.refactorize()
            layer.path = "reference"
        assert_close(model(IDS, tasks=NAMES), wide(IDS, tasks=NAMES))

    def test_rows_of_no_task_are_the_base_model_bit_for_bit(self, core, path):
        model, base = with_tasks(core, path=path), plain()
        fastspec.set_task(model, "a")  # what the model's own parameters hold plays no part
        y = model(IDS, tasks=NAMES)
        assert torch.equal(y[1], base(IDS)[1])
        assert torch.equal(model(IDS, tasks=[None] * 5), base(IDS))


def test_a_mixed_batch_sees_what_the_active_task_has_learnt():
    model = with_tasks()
    fastspec.set_task(model, "a")
    with torch.no_grad():
        model.blocks[0].up.delta.add_(1.0)
        model.head.weight.add_(1.0)
    learnt = model(IDS)
    assert_close(model(IDS, tasks=["a"] * 5), learnt)
    assert_close(model(IDS, tasks=model.task_bank.index(["a"] * 5)), learnt)


def test_merged_layers_serve_mixed_batches_from_their_base_weight():
    model = with_tasks()
    y = model(IDS, tasks=NAMES)
    fastspec.set_task(model, "a")
    fastspec.merge(model)
    assert torch.equal(model(IDS, tasks=NAMES), y)
    for change in (
        lambda: fastspec.set_task(model, "b"),
        lambda: fastspec.remove_task(model, "a"),
        lambda: fastspec.replace_task(model, "a", {}),
    ):
        with pytest.raises(ValueError, match=r"blocks\.0\.up is merged.*unmerge"):
            change()
    fastspec.replace_task(model, "b", {})


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
        assert torch.equal(model(IDS), plain()(IDS))
        assert model.task_bank.active is None

    def test_a_new_task_starts_as_the_pretrained_model(self):
        model = with_tasks()
        fastspec.set_task(model, "a")
        fastspec.add_task(model, "fresh")
        fastspec.set_task(model, "fresh")
        assert torch.equal(model(IDS), plain()(IDS))

    def test_values_of_no_task_are_not_lost(self):
        model = spectralize(plain(), SpectralConfig(rank=4))
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

    def test_biases_and_norms_switch_too_but_do_not_mix(self):
        for option in ("train_bias", "train_layernorm"):
            model = with_tasks(**{option: True})
            fastspec.set_task(model, "a")
            learnt = model(IDS)
            fastspec.set_task(model, None)
            assert torch.equal(model(IDS), plain()(IDS))
            fastspec.set_task(model, "a")
            assert torch.equal(model(IDS), learnt)
            with pytest.raises(ValueError, match=r"can't be mixed.*set_task"):
                model(IDS, tasks=NAMES)
            with pytest.raises(ValueError, match="can't be mixed"):
                model.task_bank.requires_grad_()


class TestLife:
    def test_list_replace_remove(self):
        model = with_tasks()
        assert fastspec.list_tasks(model) == ["a", "b", "c"]
        assert fastspec.list_tasks(plain()) == []
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
        assert torch.equal(model(IDS), plain()(IDS))

    def test_tables_double_and_keep_their_values(self):
        model = spectralize(plain(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model, capacity=2)
        outputs = []
        for i in range(9):
            fastspec.add_task(model, f"t{i}", random_values(bank, i))
            outputs.append(model(IDS[:1], tasks=[f"t{i}"]))
            assert bank.capacity == max(2, 1 << i.bit_length())
        for i, y in enumerate(outputs):
            assert torch.equal(model(IDS[:1], tasks=[f"t{i}"]), y)

    def test_below_the_capacity_nothing_is_allocated(self):
        model = spectralize(plain(), SpectralConfig(rank=4))
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
        model, other = with_tasks(), spectralize(plain(), SpectralConfig(rank=4))
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
        model = spectralize(plain(), SpectralConfig(rank=4))
        with torch.inference_mode():
            fastspec.add_task(model, "a", random_values(fastspec.task_bank(model), 0))
            y = model(IDS, tasks=["a"] * 5)
        fastspec.add_task(model, "b", random_values(model.task_bank, 0))
        assert torch.equal(model(IDS, tasks=["b"] * 5), y)


class TestTrainingTogether:
    @pytest.mark.parametrize("core", CORES)
    def test_gradients_are_those_of_separate_runs(self, core):
        model = with_tasks(core)
        g = torch.randn(5, 11, 3, generator=torch.Generator().manual_seed(5))
        separate = {}
        for name in "abc":
            rows = [i for i, n in enumerate(NAMES) if n == name]
            fastspec.set_task(model, name)
            model.zero_grad()
            model(IDS[rows]).backward(g[rows])
            separate[name] = {s.name: s.live.grad.clone() for s in model.task_bank.slots}
        bank = model.task_bank.requires_grad_()
        model(IDS, tasks=NAMES).backward(g)
        for row, name in enumerate("abc"):
            for slot in bank.slots:
                assert_close(slot.table.grad[row], separate[name][slot.name])
        for slot in bank.slots:
            assert not slot.table.grad[3:].any(), "rows of no task, and those of None"

    def test_a_step_trains_the_named_tasks_alone(self):
        model = with_tasks()
        y = alone(model, ["a", "b", "c"], IDS[:3])
        bank = model.task_bank.requires_grad_()
        optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
        model(IDS, tasks=["a", "c", "a", None, "c"]).square().mean().backward()
        optimizer.step()
        bank.requires_grad_(False)
        after = alone(model, ["a", "b", "c"], IDS[:3])
        assert torch.equal(after[1], y[1])
        assert not torch.equal(after[0], y[0])
        assert not torch.equal(after[2], y[2])
        assert torch.equal(model(IDS, tasks=[None] * 5), plain()(IDS))

    def test_what_would_go_wrong_silently_is_refused(self):
        model = with_tasks(names="abcdefgh")
        bank = model.task_bank.requires_grad_()
        with pytest.raises(ValueError, match="names no tasks"):
            model(IDS)
        with torch.no_grad():
            assert torch.equal(model(IDS), plain()(IDS))
        with pytest.raises(ValueError, match=r"being trained.*requires_grad_\(False\)"):
            fastspec.set_task(model, "a")
        with pytest.raises(ValueError, match="being trained and have no room for 9"):
            fastspec.add_task(model, "ninth")
        bank.requires_grad_(False)
        fastspec.add_task(model, "ninth")

    def test_checkpointed_layers_can_not_lose_their_tasks(self):
        model = with_tasks()
        model.task_bank.requires_grad_()
        block = model.blocks[1]
        block.forward = lambda x: torch.utils.checkpoint.checkpoint(
            Block.forward, block, x, use_reentrant=False
        )
        y = model(IDS, tasks=NAMES)
        with pytest.raises(ValueError, match="gradient checkpointing"):
            y.sum().backward()


class TestContext:
    def test_errors_before_anything_runs(self):
        model = with_tasks()
        ran = []
        model.embed.register_forward_hook(lambda *_: ran.append(1))
        with pytest.raises(ValueError, match="no task 'x'; the model has: 'a', 'b', 'c'"):
            model(IDS, tasks=["a", "x", None, "b", "c"])
        with pytest.raises(ValueError, match="got 2 for a batch of 5"):
            model(IDS, tasks=["a", "b"])
        with pytest.raises(TypeError, match="list of names"):
            model(IDS, tasks="a")
        with pytest.raises(ValueError, match="no task 'x'"), fastspec.tasks(["x"] * 5):
            model(IDS)
        assert not ran
        assert torch.equal(model(IDS), plain()(IDS)), "nothing is left of a refused call"

    def test_a_model_without_tasks_refuses_names(self):
        model = spectralize(plain(), SpectralConfig(rank=4))
        with pytest.raises(ValueError, match="add_task"), fastspec.tasks(NAMES):
            model(IDS)
        for call in (
            lambda: fastspec.set_task(model, "a"),
            lambda: fastspec.remove_task(model, "a"),
            lambda: fastspec.replace_task(model, "a", {}),
        ):
            with pytest.raises(ValueError, match="add_task"):
                call()
        with pytest.raises(ValueError, match="spectralize"):
            fastspec.add_task(plain(), "a")

    def test_the_argument_goes_before_the_context(self):
        model = with_tasks()
        with fastspec.tasks(["c"] * 5):
            assert torch.equal(model(IDS, tasks=["a"] * 5), alone_at("a", model))
            assert torch.equal(model(IDS, tasks=None), plain()(IDS))
            assert torch.equal(model(IDS), alone_at("c", model))
            with fastspec.tasks(["b"] * 5):
                assert torch.equal(model(IDS), alone_at("b", model))
            assert torch.equal(model(IDS), alone_at("c", model))
        assert torch.equal(model(IDS), plain()(IDS))

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_failing_call_leaves_nothing_behind(self, error):
        model = with_tasks()

        def fail(*_):
            raise error

        handle = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(error):
            model(IDS, tasks=NAMES)
        handle.remove()
        assert torch.equal(model(IDS), plain()(IDS))

    def test_parts_of_the_model_called_in_the_context_know_their_tasks(self):
        model = with_tasks()
        x = torch.randn(5, 2, 16)
        with fastspec.tasks(NAMES):
            y = model.blocks[0](x)
        fastspec.set_task(model, "c")
        assert_close(y[3:4], model.blocks[0](x[3:4]))

    def test_threads_do_not_meet(self):
        model = with_tasks()
        want = {name: model(IDS, tasks=[name] * 5) for name in ("a", "b", "c", None)}
        failures = []

        def serve(name):
            with torch.no_grad(), fastspec.tasks([name] * 5):
                for _ in range(50):
                    if not torch.equal(model(IDS), want[name]):
                        failures.append(name)

        threads = [threading.Thread(target=serve, args=(name,)) for name in want]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not failures

    @pytest.mark.parametrize("change", ["flattened", "expanded"])
    def test_layers_whose_input_is_not_the_batch_say_so(self, change):
        model = with_tasks()
        up = model.blocks[0].up
        forward = type(up).forward
        reshape = {"flattened": lambda x: x.flatten(0, 1), "expanded": lambda x: x.repeat(3, 1, 1)}
        up.forward = lambda x: forward(up, reshape[change](x))
        with pytest.raises(ValueError, match="one entry of dimension 0 for each of the 5 rows"):
            model(IDS, tasks=NAMES)

    def test_a_head_whose_input_is_not_the_batch_says_so(self):
        model = with_tasks()
        model.head.register_forward_pre_hook(lambda m, args: (args[0].flatten(0, 1),))
        with pytest.raises(ValueError, match=r"a head got \[55, 16\] in a batch of 5"):
            model(IDS, tasks=NAMES)


def alone_at(name, model):
    return model(IDS, tasks=[name] * 5)


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
            TaskBank(spectralize(plain(), SpectralConfig(rank=4)), capacity=0)

    def test_trained_norms_make_no_pretrained_ones(self):
        model = spectralize(plain(), SpectralConfig(rank=4, train_layernorm=True))
        nn.init.ones_(model.blocks[0].up.delta)
        with pytest.raises(ValueError, match="not known any more"):
            fastspec.add_task(model, "a")

    def test_printing(self):
        text = repr(with_tasks().task_bank)
        assert "3 tasks, capacity=8, active=None" in text
        assert "MiB" in text


class TestCompiled:
    def test_tasks_come_go_and_change_without_recompiling(self):
        torch._dynamo.reset()
        model = with_tasks()
        bank = model.task_bank
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)

        def check(names):
            assert_close(compiled(IDS, tasks=bank.index(names)), model(IDS, tasks=names))

        with torch.no_grad():
            check(NAMES)
            frames = counter.frame_count
            check([None, "c", "b", "b", "a"])
            fastspec.replace_task(model, "a", random_values(bank, 7))
            check(NAMES)
            fastspec.add_task(model, "d", random_values(bank, 8))
            fastspec.remove_task(model, "c")
            check(["d", "a", None, "d", "b"])
            fastspec.set_task(model, "d")
            check(["d", "a", None, "d", "b"])
        assert counter.frame_count == frames == 1

    def test_switching_does_not_recompile(self):
        torch._dynamo.reset()
        model = with_tasks()
        fastspec.set_task(model, "a")
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        with torch.no_grad():
            for name in ("a", "b", "c", "a"):
                fastspec.set_task(model, name)
                assert_close(compiled(IDS), model(IDS))
        assert counter.frame_count == 1

    def test_gradients(self):
        torch._dynamo.reset()
        model = with_tasks("dense")
        bank = model.task_bank.requires_grad_()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model(IDS, tasks=NAMES).square().mean().backward()
        want = [p.grad.clone() for p in bank.parameters()]
        for p in bank.parameters():
            p.grad = None
        compiled(IDS, tasks=bank.index(NAMES)).square().mean().backward()
        for p, grad in zip(bank.parameters(), want, strict=True):
            assert_close(p.grad, grad)

    def test_a_context_that_compiled_code_can_not_see_is_refused(self):
        torch._dynamo.reset()
        model = with_tasks()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            compiled(IDS)
            with (
                fastspec.tasks(NAMES),
                pytest.raises(Exception, match="compiled model takes its tasks"),
            ):
                compiled(IDS)
            with pytest.raises(Exception, match=r"task_bank\.index"):
                compiled(IDS, tasks=NAMES)
            assert_close(compiled(IDS), plain()(IDS))
