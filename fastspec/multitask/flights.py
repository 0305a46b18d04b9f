"""Who reads the tables and the model's own parameters, and who waits for whom.

A batch in flight keeps what it started with. What changes places that no batch reads goes on at once;
what changes values that a batch may read waits until none is in flight, and batches that start meanwhile
wait for it.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import threading
import weakref
from collections.abc import Iterator


class Flight:
    """One batch that is being computed, or a generation; it ends with its last reference at the latest."""

    def __init__(self, number: int) -> None:
        self.number = number


# flights of this thread (coroutine), of all banks: they do not wait for themselves
_own: contextvars.ContextVar[tuple[Flight, ...]] = contextvars.ContextVar("flights", default=())


class Flights:
    """The batches in flight of one bank, and the lock of everything that must be atomic."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.probing = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._flying: weakref.WeakSet[Flight] = weakref.WeakSet()
        self._numbers = itertools.count()
        self._writer: int | None = None  # the thread that waits for the flights or writes

    def __deepcopy__(self, memo: object) -> Flights:
        return Flights()

    def __reduce__(self) -> tuple:
        return Flights, ()

    def wait(self) -> None:
        """Let a writer go first, unless this thread has a batch in flight already. With the lock held."""
        me = threading.get_ident()
        while self._writer not in (None, me) and not self._own():
            self._changed.wait(1.0)

    def begin(self) -> Flight:
        """A batch starts. With the lock held, after `wait`."""
        flight = Flight(next(self._numbers))
        self._flying.add(flight)
        _own.set((*self._own(), flight))
        return flight

    def _own(self) -> tuple[Flight, ...]:
        return tuple(flight for flight in _own.get() if flight in self._flying)

    def end(self, flight: Flight) -> None:
        with self.lock:
            self._flying.discard(flight)
            if self._writer is not None:
                self._changed.notify_all()
        _own.set(tuple(f for f in _own.get() if f is not flight))

    def now(self) -> int:
        """A number above those of all flights so far."""
        return next(self._numbers)

    def none(self) -> bool:
        """Whether no batch is in flight but those of this thread."""
        own = _own.get()
        return all(flight in own for flight in self._flying)

    def over(self, moment: int) -> bool:
        """Whether every flight that had begun at this moment has ended; one's own count too."""
        return all(flight.number > moment for flight in self._flying)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The lock, with no flight of another thread."""
        with self.lock:
            outer, me = self._writer, threading.get_ident()
            while self._writer not in (None, me):
                self._changed.wait(1.0)
            self._writer = me
            try:
                while not self.none():
                    self._changed.wait(1.0)  # a flight that was dropped notifies nobody
                yield
            finally:
                self._writer = outer
                self._changed.notify_all()
