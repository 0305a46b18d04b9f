"""Threads: batches keep what they started with, stale row tensors are refused, nobody waits for ever."""

import contextlib
import copy
import threading
import time

import pytest
import torch
from support import assert_close
from tasks_support import IDS, NAMES, random_values, with_tasks
from tiny_models import gpt2, net

import fastspec
from fastspec import SpectralConfig, spectralize


class Paused:
    """Stops the forward of a module until told to go on: for one thread at the right moment."""

    def __init__(self, module):
        self.there, self.go_on = threading.Event(), threading.Event()
        self.thread = None
        module.register_forward_pre_hook(self._hook)

    def _hook(self, *_):
        if threading.current_thread() is self.thread:
            self.there.set()
            assert self.go_on.wait(30)

    @contextlib.contextmanager
    def call(self, function):
        """The call stands still inside the block, and comes to its end after it."""
        results = []

        def run():
            with torch.no_grad():
                try:
                    results.append(function())
                except Exception as e:
                    results.append(e)

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert self.there.wait(30)
        try:
            yield results
        finally:
            self.go_on.set()
            self.thread.join(30)


class Background:
    """A call that has to wait for others."""

    def __init__(self, function):
        self.thread = threading.Thread(target=function)
        self.thread.start()

    def waits(self):
        self.thread.join(0.3)
        return self.thread.is_alive()

    def ends(self):
        self.thread.join(30)
        return not self.thread.is_alive()


CHANGES = {
    "replaced": lambda model: fastspec.replace_task(model, "a", random_values(model.task_bank, 9)),
    "removed": lambda model: fastspec.remove_task(model, "a"),
    "removed, another added": lambda model: (
        fastspec.remove_task(model, "a"),
        fastspec.add_task(model, "d", random_values(model.task_bank, 9)),
    ),
    "replaced twice": lambda model: [
        fastspec.replace_task(model, "a", random_values(model.task_bank, seed)) for seed in (8, 9)
    ],
}


class TestInFlight:
    @pytest.mark.parametrize("given", ["names", "tensor"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_batch_keeps_the_tasks_it_started_with(self, change, given):
        model = with_tasks()
        want = model(IDS, tasks=NAMES)
        paused = Paused(model.blocks[1])
        index = NAMES if given == "names" else model.task_bank.index(NAMES)
        with paused.call(lambda: model(IDS, tasks=index)) as results:
            CHANGES[change](model)  # does not wait
            if change != "removed":
                name = "d" if "added" in change else "a"
                after = model(IDS, tasks=[name] * 5)
        assert torch.equal(results[0], want)
        if change != "removed":
            assert torch.equal(model(IDS, tasks=[name] * 5), after)
            values = random_values(model.task_bank, 9)
            other = with_tasks()
            fastspec.replace_task(other, "a", values)
            assert torch.equal(after, other(IDS, tasks=["a"] * 5))

    def test_a_change_that_needs_the_place_waits(self):
        model = with_tasks(names="abcdefgh")  # no place is left
        want = model(IDS, tasks=NAMES)
        paused = Paused(model.blocks[1])
        with paused.call(lambda: model(IDS, tasks=NAMES)) as results:
            change = Background(lambda: CHANGES["replaced"](model))
            assert change.waits()
            new = Background(lambda: model(IDS, tasks=NAMES))
            assert new.waits(), "batches that start meanwhile come after it"
        assert torch.equal(results[0], want)
        assert change.ends()
        assert new.ends()
        assert not torch.equal(model(IDS, tasks=NAMES), want)

    def test_growth_waits(self):
        model = with_tasks()
        want = model(IDS, tasks=NAMES)
        paused = Paused(model.blocks[1])
        wide = random_values(model.task_bank, 7, labels=6)
        with paused.call(lambda: model(IDS, tasks=NAMES)) as results:
            change = Background(lambda: fastspec.add_task(model, "wide", wide))
            assert change.waits()
        assert torch.equal(results[0], want)
        assert change.ends()
        assert model(IDS, tasks=NAMES).shape[-1] == 6

    def test_switching_waits_for_batches_of_the_active_task(self):
        model = with_tasks()
        fastspec.set_task(model, "a")
        want = model(IDS)
        paused = Paused(model.blocks[1])
        with paused.call(lambda: model(IDS)) as results:
            change = Background(lambda: fastspec.set_task(model, "b"))
            assert change.waits()
        assert torch.equal(results[0], want)
        assert change.ends()
        assert model.task_bank.active == "b"

    def test_a_batch_reads_the_active_task_as_it_was_when_the_batch_began(self):
        model = with_tasks()
        fastspec.set_task(model, "a")
        want = model(IDS, tasks=NAMES)
        paused = Paused(model.blocks[1])
        with paused.call(lambda: model(IDS, tasks=NAMES)) as results, torch.no_grad():
            model.blocks[1].down.delta.add_(1.0)  # it learns
            later = model(IDS, tasks=NAMES)
        assert torch.equal(results[0], want)
        assert not torch.equal(later, want)
        fastspec.set_task(model, "b")
        assert torch.equal(model(IDS, tasks=NAMES), later)

    def test_a_generation_is_one_batch(self):
        pytest.importorskip("transformers")
        model = spectralize(gpt2(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model)
        for seed, name in enumerate("ab"):
            fastspec.add_task(model, name, random_values(bank, seed))
        ids, names = torch.arange(10).view(2, 5), ["a", "b"]
        options = {"max_new_tokens": 4, "do_sample": False, "tasks": names}
        want = model.generate(ids, **options)
        paused = Paused(model.transformer.h[1])
        with paused.call(lambda: model.generate(ids, **options)) as results:
            for name, seed in (("a", 7), ("b", 8)):
                fastspec.replace_task(model, name, random_values(bank, seed))
        assert torch.equal(results[0], want)
        assert not torch.equal(model(ids, tasks=names).logits, gpt2()(ids).logits)

    def test_what_no_hook_sees_is_one_batch_inside_serving(self):
        model = with_tasks()
        bank, layer = model.task_bank, model.blocks[0].up
        inside, go_on = threading.Event(), threading.Event()
        seen = []

        def serve():
            with bank.serving():
                place = bank.places(bank.index(["a"]))
                inside.set()
                assert go_on.wait(30)
                seen.append(layer.delta_table[place].clone())

        served = Background(serve)
        assert inside.wait(30)
        CHANGES["removed, another added"](model)
        switch = Background(lambda: fastspec.set_task(model, "d"))
        assert switch.waits()
        go_on.set()
        assert served.ends()
        assert switch.ends()
        assert torch.equal(seen[0][0], random_values(bank, 0)["blocks.0.up.delta"])

    def test_inside_a_call_nothing_waits_for_it(self):
        model = with_tasks()
        errors = []

        def change(*_):
            try:
                fastspec.set_task(model, "b")
            except ValueError as e:
                errors.append(str(e))

        handle = model.blocks[1].register_forward_pre_hook(change)
        with torch.no_grad():
            y = model(IDS, tasks=NAMES)
            handle.remove()
            assert torch.equal(model(IDS, tasks=NAMES), y)
        assert len(errors) >= 1
        assert "inside a call of their model" in errors[0]

    def test_an_interrupted_call_holds_nobody_up(self):
        model = with_tasks()

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = model.blocks[1].register_forward_hook(interrupt)
        for names in (["a"] * 5, None):
            with pytest.raises(KeyboardInterrupt):
                model(IDS, tasks=names)
            fastspec.set_task(model, "b")
            fastspec.set_task(model, None)
        handle.remove()
        assert torch.equal(model(IDS), net()(IDS))


class TestRowTensors:
    def test_a_tensor_of_a_removed_task_is_refused(self):
        model = with_tasks()
        bank = model.task_bank
        index, other = bank.index(NAMES), bank.index(["c", None])
        want = model(IDS, tasks=index)
        assert torch.equal(model(IDS, tasks=NAMES), want)
        fastspec.remove_task(model, "b")
        for tensor in (index, index.clone(), index.cpu()[:], index + 0):
            with pytest.raises(ValueError, match=r"removed or replaced.*bank\.index"):
                model(IDS, tasks=tensor)
        assert torch.equal(model(IDS[:2], tasks=other), model(IDS[:2], tasks=["c", None]))
        fastspec.add_task(model, "new", random_values(bank, 5))
        with pytest.raises(ValueError, match="removed or replaced"):
            model(IDS, tasks=index)
        with pytest.raises(ValueError, match="removed or replaced"):
            bank.index(index)
        fastspec.add_task(model, "b", random_values(bank, 1))
        assert torch.equal(model(IDS, tasks=bank.index(NAMES)), want)

    def test_numbers_that_are_no_task_are_refused(self):
        model = with_tasks()
        for tensor in (torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 1, 2, 99, 0])):
            with pytest.raises(ValueError, match="removed or replaced"):
                model(IDS, tasks=tensor)
        for tensor in (torch.zeros(5), torch.zeros(5, 1, dtype=torch.int64)):
            with pytest.raises(TypeError, match="names or int64"):
                model(IDS, tasks=tensor)

    def test_a_tensor_that_is_changed_is_looked_at_again(self):
        model = with_tasks()
        index = model.task_bank.index(["a", "b", "c", "a", "b"])
        model(IDS, tasks=index)
        index[0] = -1
        assert torch.equal(model(IDS, tasks=index), model(IDS, tasks=[None, "b", "c", "a", "b"]))
        index[1] = 77
        with pytest.raises(ValueError, match="removed or replaced"):
            model(IDS, tasks=index)

    def test_replacing_in_quiet_keeps_the_tensor_good(self):
        model = with_tasks()
        index = model.task_bank.index(NAMES)
        CHANGES["replaced"](model)
        assert torch.equal(model(IDS, tasks=index), model(IDS, tasks=NAMES))

    def test_compiled_code_refuses_too(self):
        torch._dynamo.reset()
        model = with_tasks()
        bank = model.task_bank
        with torch.no_grad():
            want = model(IDS, tasks=NAMES)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            index = bank.index(NAMES)
            assert_close(compiled(IDS, tasks=index), want)
            fastspec.remove_task(model, "b")
            with pytest.raises(RuntimeError, match="removed or replaced"):
                compiled(IDS, tasks=index)
            fastspec.add_task(model, "b", random_values(bank, 1))
            with pytest.raises(RuntimeError, match="removed or replaced"):
                compiled(IDS, tasks=index)
            assert_close(compiled(IDS, tasks=bank.index(NAMES)), want)

    def test_a_copy_of_the_model_knows_the_tensor(self):
        model = with_tasks()
        fastspec.remove_task(model, "a")
        fastspec.add_task(model, "a", random_values(model.task_bank, 4))
        index = model.task_bank.index(NAMES)
        clone = copy.deepcopy(model)
        assert torch.equal(clone(IDS, tasks=index), model(IDS, tasks=index))


SECONDS = 1.5


class TestStress:
    """Short, and without luck: on tables without a lock hundreds of batches are wrong."""

    def serve(self, model, check, change):
        failures, done = [], threading.Event()
        counts = [0, 0]

        def server(seed):
            try:
                with torch.no_grad():
                    while not done.is_set():
                        counts[0] += 1
                        if problem := check(seed + counts[0]):
                            failures.append(problem)
            except Exception as e:
                failures.append(repr(e))

        def changer():
            try:
                while not done.is_set():
                    counts[1] += 1
                    change(counts[1])
            except Exception as e:
                failures.append(repr(e))

        threads = [threading.Thread(target=server, args=(seed,)) for seed in range(3)]
        threads.append(threading.Thread(target=changer))
        for t in threads:
            t.start()
        time.sleep(SECONDS)
        done.set()
        for t in threads:
            t.join(60)
            assert not t.is_alive(), "a thread waits for ever"
        assert not failures, failures[:3]
        assert counts[0] > 20
        assert counts[1] > 20

    def test_versions_of_a_task(self):
        """Whole batches of one version, whichever it is: by replacing, and by a new name."""
        model = with_tasks()
        versions = [random_values(model.task_bank, seed) for seed in (0, 7)]
        outputs = []
        for values in versions:
            fastspec.replace_task(model, "a", values)
            outputs.append(model(IDS, tasks=["a", "b", "a", None, "c"]).detach())

        def check(i):
            y = model(IDS, tasks=["a", "b", "a", None, "c"])
            if not any(torch.equal(y, own) for own in outputs):
                return "a batch is of no version"

        def change(i):
            fastspec.replace_task(model, "a", versions[i % 2])
            fastspec.add_task(model, f"v{i}", versions[i % 2])
            fastspec.remove_task(model, f"v{i}")

        self.serve(model, check, change)

    def test_switching_beside_named_tasks(self):
        model = with_tasks()
        names = ["a", "b", "c", "a", "b"]
        want = model(IDS, tasks=names).detach()

        def check(i):
            if not torch.equal(model(IDS, tasks=names), want):
                return "rows of another task"

        self.serve(model, check, lambda i: fastspec.set_task(model, [None, *"abc"][i % 4]))
        fastspec.set_task(model, None)
        assert torch.equal(model(IDS, tasks=names), want), "the tables are as they were"

    def test_plain_calls_beside_switching_are_of_one_task(self):
        model = with_tasks()
        own = [model(IDS, tasks=[name] * 5).detach() for name in (None, *"abc")]
        fastspec.set_task(model, None)

        def check(i):
            y = model(IDS)
            if not any(torch.allclose(y, o, atol=1e-4) for o in own):
                return "a batch of no task"

        self.serve(model, check, lambda i: fastspec.set_task(model, [None, *"abc"][i % 4]))

    def test_growth(self):
        model = spectralize(net(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model, capacity=4)
        for seed, name in enumerate("abc"):
            fastspec.add_task(model, name, random_values(bank, seed))
        want = model(IDS, tasks=NAMES).detach()

        def check(i):
            y = model(IDS, tasks=NAMES)
            if not torch.allclose(y[..., :3], want, atol=1e-5) or not y[..., 3:].isneginf().all():
                return "another output"

        def change(i):
            if i < 30:
                fastspec.add_task(model, f"t{i}", random_values(bank, i, labels=3 + i))
            else:
                fastspec.remove_task(model, f"t{i - 29}") if i < 59 else time.sleep(0.01)

        self.serve(model, check, change)
