"""What processes exchange, by real processes over gloo; and what is left if one of them goes.

    python tests/engine/test_collectives.py JOB FOLDER RANK

does a job as one of two processes, and leaves what it gives in the folder.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from accelerate import PartialState

from iet_sd.engine import collectives
from iet_sd.errors import UserError

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 4


def sums(rank):
    """Of several types, more than goes into one bucket, and in another order on each process."""
    collectives.BUCKET_BYTES = 20
    tensors = {
        "a": torch.full((3, 2), 1.0 + rank),
        "b": torch.full((2,), 10.0 * rank),
        "c": torch.arange(4) * (rank + 1),
        "d": torch.tensor(0.5),
        "e": torch.tensor(rank + 0.25),
    }
    before = dict(tensors)
    collectives.sum_in_place(dict(sorted(tensors.items(), reverse=rank == 1)), 2)
    assert all(tensors[name] is before[name] for name in tensors)
    return list(tensors.values())


def met(act):
    """What a sum says, and how long it takes to, when process 1 does ``act`` instead."""

    def job(rank):
        assert collectives.gather([rank], 2) == [0, 1]
        if rank == 1:
            act()
        began = time.monotonic()
        try:
            collectives.sum_in_place({"a": torch.ones(3)}, 2)
        except UserError as error:
            return str(error), time.monotonic() - began

    return job


JOBS = {
    "sums": sums,
    "dies": met(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "hangs": met(lambda: time.sleep(4 * TIMEOUT)),
}


def two(job, folder):
    """What a job gives on process 0, and on process 1 if that lives."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, job, str(folder), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for rank in (0, 1)
    ]
    processes[0].wait(60)
    if job == "sums":
        processes[1].wait(60)
    processes[1].kill()
    processes[1].wait()
    return [torch.load(path) for path in sorted(folder.glob("*.pt"))]


def test_sums_are_the_same_on_both_and_in_place(tmp_path):
    expected = [
        torch.full((3, 2), 3.0),
        torch.full((2,), 10.0),
        torch.arange(4) * 3,
        torch.tensor(1.0),
        torch.tensor(1.5),
    ]
    found = two("sums", tmp_path)
    assert len(found) == 2
    for mine in found:
        assert all(torch.equal(one, other) for one, other in zip(mine, expected, strict=True))


@pytest.mark.parametrize(
    ("job", "least", "most"), [("dies", 0, TIMEOUT), ("hangs", TIMEOUT - 1, 2 * TIMEOUT)]
)
def test_a_process_that_is_gone_ends_the_others_in_time_with_one_line(job, least, most, tmp_path):
    ((said, seconds),) = two(job, tmp_path)
    assert ("has ended" if job == "dies" else "--ddp_timeout") in said
    assert "--resume_from_checkpoint latest" in said
    assert "\n" not in said
    assert least <= seconds <= most


if __name__ == "__main__":
    _, job, folder, rank = sys.argv
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    here = {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= here  # accelerate takes the group as it is, but asks for these
    PartialState(cpu=True)
    torch.save(JOBS[job](int(rank)), Path(folder) / f"{rank}.pt")
    os._exit(0)  # without waiting for the other one
