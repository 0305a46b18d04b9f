"""Many tasks on one model: mixed batches against each task alone, training together, the context."""

import copy
import threading

import pytest
import torch
from support import assert_close
from tasks_support import IDS, NAMES, alone, random_values, with_tasks
from tiny_models import Block, net
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.cores import CORES
from fastspec.model.targets import spectral_layers


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
        model, base = with_tasks(core, path=path), net()
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
        assert torch.equal(model(IDS, tasks=[None] * 5), net()(IDS))

    def test_what_would_go_wrong_silently_is_refused(self):
        model = with_tasks(names="abcdefgh")
        bank = model.task_bank.requires_grad_()
        with pytest.raises(ValueError, match="names no tasks"):
            model(IDS)
        with torch.no_grad():
            assert torch.equal(model(IDS), net()(IDS))
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
        assert torch.equal(model(IDS), net()(IDS)), "nothing is left of a refused call"

    def test_a_model_without_tasks_refuses_names(self):
        model = spectralize(net(), SpectralConfig(rank=4))
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
            fastspec.add_task(net(), "a")

    def test_the_argument_goes_before_the_context(self):
        model = with_tasks()
        with fastspec.tasks(["c"] * 5):
            assert torch.equal(model(IDS, tasks=["a"] * 5), alone_at("a", model))
            assert torch.equal(model(IDS, tasks=None), net()(IDS))
            assert torch.equal(model(IDS), alone_at("c", model))
            with fastspec.tasks(["b"] * 5):
                assert torch.equal(model(IDS), alone_at("b", model))
            assert torch.equal(model(IDS), alone_at("c", model))
        assert torch.equal(model(IDS), net()(IDS))

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_failing_call_leaves_nothing_behind(self, error):
        model = with_tasks()

        def fail(*_):
            raise error

        handle = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(error):
            model(IDS, tasks=NAMES)
        handle.remove()
        assert torch.equal(model(IDS), net()(IDS))

    def test_parts_of_the_model_called_in_the_context_know_their_tasks(self):
        model = with_tasks()
        x = torch.randn(5, 2, 16)
        with fastspec.tasks(NAMES):
            with pytest.raises(ValueError, match="call the whole model once"):
                model.blocks[0](x)
            model(IDS)
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


def alone_at(name, model):
    return model(IDS, tasks=[name] * 5)


def in_context(model):
    with fastspec.tasks(NAMES):
        return model(IDS)


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
            with pytest.raises(Unsupported, match=r"call the whole model once.*not compiled"):
                compiled(IDS, tasks=bank.index(NAMES))
            model(IDS, tasks=NAMES)
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
        assert counter.frame_count == frames == 2, "the look at the row tensor, and the model"

    def test_a_wider_head_within_the_reserve_changes_no_table(self):
        torch._dynamo.reset()
        model = spectralize(net(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model, capacity=4, head_size=6)
        fastspec.add_task(model, "a", random_values(bank, 0))
        places = [slot.table.data_ptr() for slot in bank.slots]
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)

        def check(names):
            got = compiled(IDS, tasks=bank.index(names))
            assert got.shape == (5, 11, 6)
            assert_close(got.nan_to_num(neginf=0), model(IDS, tasks=names).nan_to_num(neginf=0))
            return got

        with torch.no_grad():
            model(IDS, tasks=["a", None, "a", None, "a"])
            check(["a", None, "a", None, "a"])
            fastspec.add_task(model, "wide", random_values(bank, 1, labels=6))
            fastspec.add_task(model, "small", random_values(bank, 2, labels=2))
            got = check(["a", "wide", "small", None, "wide"])
        assert got.isneginf().sum(-1)[:, 0].tolist() == [3, 0, 4, 3, 0]
        assert counter.frame_count == 2
        assert [slot.table.data_ptr() for slot in bank.slots] == places
        # beyond it the tables of heads are made wider, and those alone
        fastspec.add_task(model, "wider", random_values(bank, 3, labels=7))
        moved = {
            slot.name
            for slot, place in zip(bank.slots, places, strict=True)
            if slot.table.data_ptr() != place
        }
        assert moved == {"head.weight", "head.bias"}
        assert fastspec.task_bank(model, head_size=9).slots[-1].table.shape[1] == 9
        assert bank.capacity == 4

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

    @pytest.mark.parametrize(
        "how", ["whole", "blocks", "a layer", "in place", "broken", "with a part that is not"]
    )
    def test_names_compiled_code_can_not_see_are_not_passed_over(self, how):
        """Without fullgraph=True what would need them runs uncompiled, whatever was called before."""
        torch._dynamo.reset()
        model = with_tasks()
        index = model.task_bank.index(NAMES)
        with torch.no_grad():
            want, plain = model(IDS, tasks=NAMES), model(IDS)
        assert not torch.allclose(want, plain)
        compiled = model
        if how == "blocks":
            model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
            model.head = torch.compile(model.head, backend="eager")
        elif how == "a layer":
            model.blocks[1].up.compile(backend="eager")
        elif how == "in place":
            model.compile(backend="eager")
        else:
            compiled = torch.compile(model, backend="eager")
        if how == "broken":
            model.blocks[0].register_forward_hook(lambda *args: torch._dynamo.graph_break())
        elif how == "with a part that is not":
            model.blocks[0].forward = torch._dynamo.disable(model.blocks[0].forward)
        ways = {
            "none": lambda: (compiled(IDS), plain),
            "names": lambda: (compiled(IDS, tasks=NAMES), want),
            "index": lambda: (compiled(IDS, tasks=index), want),
            "context": lambda: (in_context(compiled), want),
            "uncompiled": lambda: (model(IDS), plain),
        }
        with torch.no_grad():
            for first in ways:
                torch._dynamo.reset()
                for way in (first, *ways, *reversed(ways)):
                    got, wanted = ways[way]()
                    assert torch.allclose(got, wanted, atol=1e-5), (first, way)

    def test_a_context_that_compiled_code_can_not_see_is_refused(self):
        torch._dynamo.reset()
        model = with_tasks()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            compiled(IDS)
            with (
                fastspec.tasks(NAMES),
                pytest.raises(Unsupported, match="compiled model takes its tasks"),
            ):
                compiled(IDS)
            with pytest.raises(Unsupported, match=r"task_bank\.index"):
                compiled(IDS, tasks=NAMES)
            assert_close(compiled(IDS), net()(IDS))
