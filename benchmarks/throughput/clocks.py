"""Clocks around functions, put there from outside: where the time of a run goes, by part.

A function's time is its own, without that of other clocked functions inside it. Forward passes of
the UNet without a gradient are those that score apart from training.
"""

import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState

REST, UNET, SCORING = "rest", "UNet forward", "UNet forward, no gradient"


@dataclass
class Clock:
    """Seconds by part; time goes to the innermost part under way."""

    seconds: Counter[str] = field(default_factory=Counter)
    _under_way: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Time in here is of ``part``, but for parts inside."""
        self._settle()
        self._under_way.append(part)
        try:
            yield
        finally:
            self._settle()
            self._under_way.pop()

    def restart(self) -> None:
        """Forget all seconds so far."""
        self._settle()
        self.seconds.clear()

    def so_far(self) -> "Clock":
        """A clock that has what this one has now, and stands."""
        self._settle()
        return Clock(self.seconds.copy())

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._under_way:
            self.seconds[self._under_way[-1]] += now - self._since
        self._since = now


@dataclass
class Profile:
    """Of a run, without its first rounds."""

    clock: Clock = field(default_factory=Clock)
    trained: int = 0
    """Images."""
    steps: int = 0

    def shares(self) -> Counter[str]:
        """Of the whole, by part; 0 for others."""
        seconds = self.clock.seconds
        return Counter({part: each / seconds.total() for part, each in seconds.items()})


@contextmanager
def clocked(parts: Sequence[tuple[str, str]], clock: Clock) -> Iterator[None]:
    """A run in this process with clocks around functions: each of ``parts`` a name, MODULE:NAME.

    Errors: `SystemExit` if a function is gone.
    """
    with ExitStack() as patches:
        for part, place in parts:
            owner, name, function = _find(place)
            patches.enter_context(mock.patch.object(owner, name, _clocked(function, part, clock)))
        try:
            yield
        finally:
            # Accelerate keeps its settings for the life of a process.
            AcceleratorState._reset_state(reset_partial_state=True)


def _find(place: str) -> tuple[Any, str, Callable[..., Any]]:
    """What holds a function, its name there, and itself."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    try:
        owner = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        return owner, name, getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(
            f"{place} is gone ({error}): say in benchmarks/throughput what has taken its place."
        ) from error


def _clocked(function: Callable[..., Any], part: str, clock: Clock) -> Callable[..., Any]:
    """The function, its time counted; of a generator the time between two of its values."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        scores = part == UNET and not torch.is_grad_enabled()
        with clock.within(SCORING if scores else part):
            return function(*args, **kwargs)

    @wraps(function)
    def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        made = function(*args, **kwargs)
        try:
            while True:
                with clock.within(part):
                    try:
                        value = next(made)
                    except StopIteration:
                        return
                yield value
        finally:
            made.close()

    return generate if isgeneratorfunction(function) else call
