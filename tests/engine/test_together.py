"""Two real processes agree on values and errors, and a wait for the other ends by a signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iet_sd.engine.collectives import from_main, together
from iet_sd.errors import UserError

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import datetime, os, sys, time
import torch.distributed
from accelerate import PartialState
from iet_sd.cli.common import status_of
from iet_sd.engine import collectives, stopping
from iet_sd.errors import UserError

store, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
PartialState(cpu=True)
stopping._PATIENCE = 0.3

def fails(on, error):
    if rank == on:
        raise error
    return rank

def said(call):
    try:
        print(call(), flush=True)
    except (UserError, OSError) as error:
        print(type(error).__name__, error, flush=True)

"""


def two_processes(text, folder):
    """Start a program in two processes that know each other."""
    here = {"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM + text, str(folder / "store"), str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]


def test_values_and_errors_reach_both(tmp_path):
    text = """
said(lambda: collectives.from_main(lambda: f"of {rank}", rank, 2))
said(lambda: collectives.from_main(lambda: fails(0, UserError("no such thing")), rank, 2))
said(lambda: collectives.together(lambda: fails(1, OSError(28, "No space left")), 2))
said(lambda: collectives.gather([rank], 2))
"""
    for run in two_processes(text, tmp_path):
        output, errors = run.communicate(timeout=60)
        assert output.splitlines() == [
            "of 0",
            "UserError no such thing",
            "OSError [Errno 28] No space left",
            "[0, 1]",
        ], errors


MEETINGS = {
    "wait": "collectives.wait(2)",
    "main_first": """
with collectives.main_first(rank, 2):
    print("read", flush=True)
    fails(0, UserError("no such data"))
""",
}


@pytest.mark.parametrize("meeting", MEETINGS.values(), ids=MEETINGS)
def test_a_mistake_of_the_main_process_ends_the_wait_of_the_other_in_one_line(meeting, tmp_path):
    text = f"""
collectives.gather([0], 2)

def meet():
    if rank == 0 and "first" not in {meeting!r}:
        raise UserError("no such data")
    exec({meeting!r}, globals())

sys.exit(status_of(meet, ""))
"""
    main, other = two_processes(text, tmp_path)
    (_, mistake), (done, errors) = main.communicate(timeout=60), other.communicate(timeout=60)
    assert mistake.splitlines()[-1] == "error: no such data"
    assert errors.splitlines()[-1].startswith("error (process 1): Another process of this run has")
    assert "Traceback" not in errors
    assert (main.returncode, other.returncode, done) == (2, 2, "")


def test_the_main_process_goes_first_and_all_leave_a_wait_together(tmp_path):
    text = """
place = store + ".read"
with collectives.main_first(rank, 2):
    print(os.path.exists(place), flush=True)
    open(place, "w").close()
collectives.wait(2)
"""
    main, other = two_processes(text, tmp_path)
    assert [run.communicate(timeout=60)[0] for run in (main, other)] == ["False\n", "True\n"]


def test_a_signal_ends_the_wait_for_the_other(tmp_path):
    text = """
collectives.gather([0], 2)
print("ready", flush=True)
if rank == 1:
    time.sleep(60)

def wait():
    with stopping.Signals() as signals:
        signals.release("All is kept.")
        said(lambda: collectives.gather([rank], 2))

sys.exit(status_of(wait, ""))
"""
    waiting, other = two_processes(text, tmp_path)
    assert waiting.stdout.readline() == "ready\n"
    time.sleep(0.5)
    waiting.terminate()
    _, errors = waiting.communicate(timeout=60)
    other.kill()
    other.communicate()
    assert waiting.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "Stopped by SIGTERM. All is kept."


def test_one_process_alone():
    def full():
        raise OSError(28, "No space left")

    def mistake():
        raise UserError("no such thing")

    assert from_main(lambda: 3, 0, 1) == 3
    with pytest.raises(UserError, match="no such thing"):
        from_main(mistake, 0, 1)
    with pytest.raises(OSError, match="No space left"):
        together(full, 1)
