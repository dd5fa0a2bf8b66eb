"""kill -9 at random moments: every run that goes on ends as the one that was never stopped.

Two in three are aimed at a checkpoint that is being written. The short form runs always; the
long one, of 52 kills over full and LoRA in one and two processes:

    pytest -m slow tests/test_kill.py
"""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from iet_sd.engine import checkpoint
from tests.compare import equal
from tests.engine.running import timeless
from tests.launching import Launched, finish

SLOW_DISK = Path(__file__).parent / "slow_disk.py"
# Where a checkpoint is written before it is moved to its place.
STAGING = {
    "in the save of a round": ".checkpoint-*.partial",
    "in a save within a round": "checkpoint-*/process-*/.*.partial",
}
# Everything below the running mean is skipped, so that there is something to remember.
RUN = {
    "num_rounds": 24,
    "steps_per_round": 5,
    "agc_threshold": 1.0,
    "bank_bins": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
}


def saves(output_dir):
    """What is saved, by name: changes with every save."""
    return {str(path) for path in output_dir.rglob("state.json")}


def kill_somewhere(argv, output_dir, processes, moments, aim):
    """Start a run and kill it; where it was."""
    before = saves(output_dir)
    run = Launched(argv, processes, SLOW_DISK)
    # It trains: something new is saved.
    run.until(lambda: saves(output_dir) - before)
    run.processes()
    time.sleep(moments.uniform(0, 1))
    if aim:
        run.until(lambda: any(output_dir.glob(STAGING[aim])))
    assert run.alive(), run.output()
    run.kill()
    hit = [name for name, pattern in STAGING.items() if any(output_dir.glob(pattern))]
    return hit[0] if hit else "elsewhere"


def survive(argv, output_dir, processes, aims, seed):
    """Kill a run again and again, then let it finish; how many kills were where."""
    moments, hits = random.Random(seed), Counter()
    for aim in aims:
        place = None
        # An aim that was missed, as the write ended meanwhile, is taken again.
        while place is None or place != (aim or place):
            resume = ["--resume_from_checkpoint", "latest"] if hits else []
            place = kill_somewhere([*argv, *resume], output_dir, processes, moments, aim)
            hits[place] += 1
    finish([*argv, "--resume_from_checkpoint", "latest"], processes)
    return hits


def check_equal(one, other):
    """All that two runs have left, but for what depends on the clock."""
    assert timeless(one / "metrics.jsonl") == timeless(other / "metrics.jsonl")
    last = checkpoint.find(one, "latest").folder.name
    states = [*(one / last).glob("*.safetensors"), *one.glob("unet/*.safetensors")]
    states += one.glob("*.safetensors")
    assert len(states) > 4
    for path in states:
        there = other / path.relative_to(one)
        assert equal(load_file(path), load_file(there)), there
    for path in (one / last).glob("proxy-*.json"):
        assert path.read_bytes() == (other / last / path.name).read_bytes()
    assert not list(other.rglob("*partial*"))


def test_a_run_that_is_killed_goes_on_exactly(argv, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    short = RUN | {"num_rounds": 9}
    finish(argv(**short, output_dir=whole), processes=0)
    hits = survive(argv(**short, output_dir=broken), broken, processes=0, aims=STAGING, seed=0)
    assert all(hits[place] for place in STAGING)
    check_equal(whole, broken)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2], ids=["one process", "two processes"])
@pytest.mark.parametrize("train_mode", ["full", "lora"])
def test_fifty_kills(train_mode, processes, argv, tmp_path):
    """13 kills or more for each of the four: 52 in all."""
    given = RUN | {"train_mode": train_mode}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(argv(**given, output_dir=whole), processes)
    flags = argv(**given, output_dir=broken)
    aims = [None, *STAGING] * 4 + [None]
    hits = survive(flags, broken, processes, aims, seed=processes)
    print(f"{train_mode}, {processes or 1} processes, {hits.total()} kills: {dict(hits)}")
    assert all(hits[place] >= 4 for place in STAGING)
    check_equal(whole, broken)
