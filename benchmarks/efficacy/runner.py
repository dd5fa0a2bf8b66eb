"""Runs the cells that are missing, each in a process of its own, until the time is up."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.efficacy import results as files
from benchmarks.efficacy.cell import BUSY
from benchmarks.efficacy.protocol import ROOT, Protocol
from benchmarks.efficacy.study import DEFAULT_RATE, Cell, cells

_LOOK_EVERY = 1.0
_PATIENCE = 120
"""Seconds that a stopped cell has to save itself."""
_STOPPED = 128 + signal.SIGTERM
_TELL = 12
"""Lines of a failed cell's log that are shown."""


def missing(study: str, protocol: Protocol, results: Path) -> list[Cell]:
    """The cells that have no result of today's settings, by what is known of rates now."""
    there = files.read_all(results, protocol)
    known = {cell: result for cell, result in there.items() if files.is_current(result)}

    def rate(mode: str, method: str) -> float:
        return files.tuned_rate(known, mode, method) or DEFAULT_RATE[mode, method]

    return [cell for cell in cells(study, rate) if cell not in known]


@dataclass
class Running:
    """A cell under way."""

    cell: Cell
    process: subprocess.Popen
    log: IO[str]
    began: float


def start(cell: Cell, protocol: Protocol, work_dir: Path, results: Path) -> Running:
    """Start the process of a cell; its log lies in ``work_dir``."""
    work_dir.mkdir(parents=True, exist_ok=True)
    spec = work_dir / f"{cell.name}.json"
    content = {
        "cell": cell.as_dict(),
        "protocol": protocol.as_dict(),
        "work_dir": str(work_dir),
        "results": str(results),
    }
    spec.write_text(json.dumps(content))
    log = (work_dir / f"{cell.name}.log").open("a")
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.efficacy.cell", str(spec)],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Running(cell, process, log, time.monotonic())


def run(
    study: str,
    protocol: Protocol,
    work_dir: Path,
    results: Path,
    workers: int = 1,
    minutes: float | None = None,
) -> int:
    """Run what is missing; the number of cells that failed.

    After ``minutes``, or by a Ctrl-C, what is under way is told to stop; it goes on from its
    checkpoint next time.
    """
    end = time.monotonic() + 60 * minutes if minutes else None
    running: list[Running] = []
    failed: set[Cell] = set()
    elsewhere: set[Cell] = set()
    try:
        while not end or time.monotonic() < end:
            for each in [r for r in running if r.process.poll() is not None]:
                running.remove(each)
                _end(each, failed, elsewhere)
            busy = {each.cell for each in running} | failed | elsewhere
            ahead = [cell for cell in missing(study, protocol, results) if cell not in busy]
            for cell in ahead[: workers - len(running)]:
                print(f"{_clock()} {cell.name}: begun; {len(ahead)} cells ahead", flush=True)
                running.append(start(cell, protocol, work_dir, results))
            if not running:
                break
            _wait(running, end)
    except KeyboardInterrupt:
        print(f"{_clock()} told to stop", flush=True)
    for each in running:
        each.process.terminate()
    for each in running:
        each.process.wait(_PATIENCE)
        _end(each, failed, elsewhere)
    return len(failed)


def _wait(running: list[Running], end: float | None) -> None:
    """Until a cell ends, or the time is up."""
    while all(each.process.poll() is None for each in running):
        if end and time.monotonic() > end:
            return
        time.sleep(_LOOK_EVERY)


def _end(each: Running, failed: set[Cell], elsewhere: set[Cell]) -> None:
    """Say how a cell ended."""
    each.log.close()
    status, name = each.process.returncode, each.cell.name
    seconds = time.monotonic() - each.began
    if status == BUSY:
        elsewhere.add(each.cell)
    elif status == 0:
        print(f"{_clock()} {name}: done in {seconds:.0f} s", flush=True)
    elif status in (_STOPPED, -signal.SIGTERM):
        print(f"{_clock()} {name}: stopped after {seconds:.0f} s, to go on next time", flush=True)
    else:
        failed.add(each.cell)
        lines = Path(each.log.name).read_text().splitlines()[-_TELL:]
        print(f"{_clock()} {name}: failed, status {status}:", *lines, sep="\n  ", flush=True)


def _clock() -> str:
    return time.strftime("%H:%M:%S")
