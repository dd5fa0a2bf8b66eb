"""Where the time of a step goes: clocks around functions of `iet_sd`, put there from outside.

A function's time is its own, without that of other clocked functions inside it. Forward passes of
the UNet without a gradient are those that score apart from training.
"""

import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from benchmarks.throughput import tables
from benchmarks.throughput.rows import ROWS, Setting, argv_of, script_of
from iet_sd.cli.train import train
from iet_sd.engine.rounds import Trainer
from iet_sd.engine.state import RoundDone

REST, UNET, SCORING = "rest", "UNet forward", "UNet forward, no gradient"
PARTS = (
    ("data", "iet_sd.data.dataset:Loader.batches"),
    ("data", "iet_sd.data.dataset:TrainingImages.example"),
    ("data", "iet_sd.engine.second_pass:collate"),
    ("VAE, latents", "iet_sd.engine.objective:Objective.encode_images"),
    ("text", "iet_sd.engine.objective:Objective.encode_captions"),
    ("noise, loss", "iet_sd.engine.objective:Objective.prepare"),
    ("noise, loss", "iet_sd.engine.objective:Objective.select"),
    ("noise, loss", "iet_sd.engine.objective:Objective.loss_of"),
    (UNET, "diffusers:UNet2DConditionModel.forward"),
    ("backward", "iet_sd.engine.proxy:Proxy.backward"),
    ("optimizer", "iet_sd.engine.proxy:Proxy.clip_gradient"),
    ("optimizer", "iet_sd.engine.proxy:Proxy.update"),
    ("optimizer", "iet_sd.engine.proxy:Proxy.update_with_zero_gradient"),
    ("method", "iet_sd.engine.step:decide"),
    ("method", "iet_sd.engine.step:take"),
    ("method", "iet_sd.engine.step:take_or_drop"),
    ("method", "iet_sd.method.taa:magnitudes"),
    ("rest of a step", "iet_sd.engine.rounds:accumulate_gradient"),
    ("proxies", "iet_sd.engine.proxy:Proxy.enter"),
    ("proxies", "iet_sd.engine.proxy:Proxy.leave"),
    ("proxies", "iet_sd.engine.rounds:Trainer.take_in"),
    ("proxies", "iet_sd.engine.rounds:Trainer.run_round"),
    (REST, "iet_sd.engine.rounds:Trainer.train_shard"),
    ("logging", "iet_sd.reporting:Reporter.show"),
)
"""Parts and what they are clocked around, MODULE:NAME.

``method``: bank, mask, strengths, and who is trained next. ``rest of a step``: counts, lists of
samples, and memory that is freed.
``proxies``: what a round costs beside its steps: taking turns, averages, redistribution.
"""
NAMES = (SCORING, *dict.fromkeys(part for part, _ in PARTS))


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

    def shares(self) -> dict[str, float]:
        """Of the whole, by part."""
        return {part: self.clock.seconds[part] / self.clock.seconds.total() for part in NAMES}


def profile(argv: Sequence[str], warm_up: int) -> Profile:
    """Train in this process with clocks, which run after ``warm_up`` rounds.

    Errors: `SystemExit` if training fails, or a function of `PARTS` is gone.
    """
    found = Profile()
    run = Trainer.run

    def clocked_run(self: Trainer, state: Any) -> Iterator[Any]:
        with found.clock.within(REST):
            for event in run(self, state):
                yield event
                if not isinstance(event, RoundDone):
                    continue
                if event.round <= warm_up:
                    found.clock.restart()
                else:
                    found.trained += sum(shard.counts.trained for shard in event.shards)
                    found.steps += sum(shard.counts.steps for shard in event.shards)

    with clocked(PARTS, found.clock), mock.patch.object(Trainer, "run", clocked_run):
        try:
            status = train(argv)
        finally:
            # Accelerate keeps its settings for the life of a process.
            AcceleratorState._reset_state(reset_partial_state=True)
    if status:
        raise SystemExit(status)
    return found


@contextmanager
def clocked(parts: Sequence[tuple[str, str]], clock: Clock) -> Iterator[None]:
    """With clocks around the functions of ``parts``; see `PARTS`."""
    with ExitStack() as patches:
        for part, place in parts:
            owner, name, function = _find(place)
            patches.enter_context(mock.patch.object(owner, name, _clocked(function, part, clock)))
        yield


def profiles(
    setting: Setting,
    rows: Sequence[str],
    warm_up: int,
    rounds: int,
    work: Path,
    peers: Path | None = None,
) -> tuple[str, dict[str, Any]]:
    """Rows one after the other in this process: a table in Markdown, and seconds by row and part.

    ``rounds`` are clocked, after ``warm_up``. ``peers``: the folder of diffusers' scripts.
    """
    from benchmarks.throughput.peer_parts import peer_profile

    found = {}
    for key in (bar := tqdm(rows)):
        bar.set_description(f"Row {key}")
        row = ROWS[key]
        argv = argv_of(row, setting, warm_up + rounds, work / key, work / "cache" / key)
        if row.peer:
            script = script_of(row, setting.train_mode, peers)
            steps = setting.updates(rounds)
            found[key] = peer_profile(script, argv, setting.updates(warm_up), steps, setting.batch)
        else:
            found[key] = profile(argv, warm_up)
    record = {
        key: {"seconds": dict(p.clock.seconds), "trained": p.trained, "steps": p.steps}
        for key, p in found.items()
    }
    return table(found), record


def table(found: Mapping[str, Profile]) -> str:
    """Shares of parts, a column a row, and the whole."""
    shares = {key: p.shares() for key, p in found.items()}
    head = ["part", *(f"{key}: {ROWS[key].title}" for key in found)]
    rows = [[part, *(f"{shares[key][part]:.1%}" for key in found)] for part in NAMES]
    for what in ("steps", "trained"):
        each = [1e3 * p.clock.seconds.total() / getattr(p, what) for p in found.values()]
        name = "ms a step" if what == "steps" else "ms a trained image"
        rows.append([name, *(f"{milliseconds:.1f}" for milliseconds in each)])
    return tables.markdown(head, rows)


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
            f"{place} is gone ({error}): say in benchmarks/throughput/parts.py what has taken its "
            "place."
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
