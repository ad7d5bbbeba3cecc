"""Which example is being read, said aloud when reading takes long: a network folder that hangs raises nothing."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SLOW_SECONDS = 30.0
_place: ContextVar[list[str] | None] = ContextVar("_place", default=None)


class SlowDataWarning(UserWarning):
    """Reading takes unusually long; the message names the example and its file."""


@contextmanager
def named_when_slow(seconds: float = SLOW_SECONDS) -> Iterator[None]:
    """Warn every `seconds` that the with block lasts, naming what `reading` was last told: also where it never ends."""
    place, done = ["its first example"], threading.Event()
    token = _place.set(place)

    def watch() -> None:
        rounds = 0
        while not done.wait(seconds):
            rounds += 1
            message = f"Reading a batch has taken {rounds * seconds:.0f} s so far; at present: {place[0]}."
            warnings.warn(message, SlowDataWarning, stacklevel=2)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        _place.reset(token)


def reading(place: str) -> None:
    """Note what is read next, for the `named_when_slow` around it, if any."""
    noted = _place.get()
    if noted is not None:
        noted[0] = place
