"""kill -9 at random moments: every run that goes on ends as the one that was never stopped.

The short form runs always; the long one, of 50 kills over full and LoRA in one and two processes:

    pytest -m slow tests/test_kill.py
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.compare import equal
from tests.pipelines import RESOLUTION

ROOT = Path(__file__).parent.parent


def start(argv, processes):
    """The training script in a process group of its own, one or several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += [
            "--master_port",
            "0",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
        ]
    return subprocess.Popen(
        [*launcher, str(ROOT / "train_iet_sd.py"), *argv],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(argv, processes):
    """Run to the end."""
    run = start(argv, processes)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output


def began(output_dir, run, since):
    """Wait until the run is training: it has saved something after the time ``since``, or ended."""
    while run.poll() is None:
        for path in output_dir.rglob("state.json"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > since:
                    return
        time.sleep(0.02)


def result(output_dir):
    """Weights and metrics, without what depends on the clock."""
    (weights,) = [
        *output_dir.glob("unet/*.safetensors"),
        *output_dir.glob("pytorch_lora_weights.safetensors"),
    ]
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in lines
    ]
    return load_file(weights), timeless


def survive(argv, output_dir, processes, kills, seed):
    """Kill the run at random moments, then let it finish; returns how many kills it was alive."""
    moments = random.Random(seed)
    hit = 0
    for number in range(kills):
        resume = ["--resume_from_checkpoint", "latest"] if number else []
        since = time.time()
        run = start([*argv, *resume], processes)
        began(output_dir, run, since)
        time.sleep(moments.uniform(0, 1))
        hit += run.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    finish([*argv, "--resume_from_checkpoint", "latest"], processes)
    return hit


@pytest.fixture
def argv(pipelines, images, tmp_path):
    def make(name, **given):
        flags = {
            "pretrained_model_name_or_path": pipelines["sd1"],
            "train_data_dir": images,
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "resolution": RESOLUTION,
            "train_batch_size": 4,
            "num_shards": 2,
            "num_rounds": 4,
            "steps_per_round": 30,
            "checkpointing_steps": 1,
            "seed": 0,
            "report_to": "none",
        } | given
        return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]

    return make


def test_a_run_that_is_killed_goes_on_exactly(argv, tmp_path):
    finish(argv("whole"), 1)
    assert survive(argv("broken"), tmp_path / "broken", 1, kills=2, seed=0) == 2
    one, other = result(tmp_path / "whole"), result(tmp_path / "broken")
    assert equal(one[0], other[0])
    assert one[1] == other[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("train_mode", ["full", "lora"])
def test_fifty_kills(train_mode, processes, argv, tmp_path):
    """13 kills for each of the four: 52 in all."""
    given = {"train_mode": train_mode, "steps_per_round": 100}
    finish(argv("whole", **given), processes)
    hit = survive(argv("broken", **given), tmp_path / "broken", processes, kills=13, seed=1)
    one, other = result(tmp_path / "whole"), result(tmp_path / "broken")
    assert equal(one[0], other[0])
    assert one[1] == other[1]
    print(f"{train_mode}, {processes} processes: {hit} of 13 kills hit a living run")
    assert hit >= 10
