"""Threads that both have to wait for a batch: each has its turn, and batches after them go on."""

import threading

from tasks_support import IDS, NAMES, with_tasks

import fastspec


def test_two_threads_that_wait_for_a_batch_leave_nobody_waiting():
    model = with_tasks()
    bank = model.task_bank
    changes = [threading.Thread(target=fastspec.set_task, args=(model, name)) for name in "ab"]
    with bank.serving():
        for change in changes:
            change.start()
            change.join(0.3)
            assert change.is_alive(), "it waits for the batch"
    for change in changes:
        change.join(30)
        assert not change.is_alive()
    batch = threading.Thread(target=lambda: model(IDS, tasks=NAMES), daemon=True)
    batch.start()
    batch.join(30)
    assert not batch.is_alive(), "no thread is left that others take for a writer"
