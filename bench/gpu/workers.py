"""Many checks in several processes: each its own interpreter and context, restarted where one breaks.

A kernel that touches what it must not poisons its process's context. So a worker that failed on a CUDA
error, died or hung is replaced, and the rest of the checks are not lost.
"""

from __future__ import annotations

import importlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

MARK = "result "  # what a worker's answers begin with; all else it prints is passed on


class Worker:
    """A process that runs `check(index)` of a module and answers in JSON."""

    def __init__(self, module: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu.workers", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def ask(self, index: int, seconds: float) -> dict[str, Any]:
        """The answer, or {"error": ...}; then `alive` tells whether it can be asked again."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        last: list[str] = []
        try:
            self.process.stdin.write(f"{index}\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
                last = [*last[-30:], line]
        except OSError as error:
            last.append(str(error))
        finally:
            timer.cancel()
        self.process.kill()
        status = self.process.wait()
        return {"error": f"the process ended ({status}): " + "".join(last)[-1200:]}

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def run(
    module: str,
    indices: Sequence[int],
    count: int,
    seconds: float,
    answered: Callable[[int, dict[str, Any]], None],
    ends: float = float("inf"),
) -> None:
    """Ask `count` workers for every index in order, at most `seconds` each, nothing after `ends`.

    `answered(index, result)` is called from one thread at a time.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in indices:
        waiting.put(index)
    lock = threading.Lock()

    def serve() -> None:
        worker = Worker(module)
        try:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                remaining = ends - time.time()
                if remaining < 1:
                    result: dict[str, Any] = {"skipped": "no time left"}
                else:
                    result = worker.ask(index, min(seconds, remaining))
                with lock:
                    answered(index, result)
                if result.pop("poisoned", False) or not worker.alive:
                    worker.close()
                    worker = Worker(module)
        finally:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(min(count, len(indices)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(module: str) -> int:
    """A worker: reads indices, one a line, and answers each."""
    check = importlib.import_module(module).check
    for line in sys.stdin:
        started = time.perf_counter()
        try:
            result = check(int(line))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            poisoned = "CUDA error" in text or "CUDA driver" in text
            result = {"error": text[-1200:], "poisoned": poisoned}
        result["seconds"] = round(time.perf_counter() - started, 2)
        print(MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
