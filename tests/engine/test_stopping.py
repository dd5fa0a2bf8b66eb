"""Signals: obeyed at once, or when it is time to; a process that is stuck; children; launchers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iet_sd.engine.stopping import Signals
from iet_sd.errors import Stopped

ROOT = Path(__file__).parent.parent.parent


def kill_me(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_at_once_with_what_is_kept():
    with Signals() as signals:
        signals.release("All is kept.")
        with pytest.raises(Stopped) as stop:
            kill_me()
    assert str(stop.value) == "Stopped by SIGTERM. All is kept."
    assert not isinstance(stop.value, Exception)
    with Signals(), pytest.raises(Stopped) as stop:
        kill_me()
    assert str(stop.value) == "Stopped by SIGTERM."


def test_held_until_released():
    with Signals() as signals:
        signals.hold()
        kill_me(signal.SIGHUP)
        kill_me()
        assert signals.number == signal.SIGHUP
        with pytest.raises(Stopped, match=r"SIGHUP. Kept"):
            signals.release("Kept.")


def test_a_ctrl_c_after_another_signal_ends_as_it_always_does():
    with Signals() as signals:
        signals.hold()
        kill_me(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            kill_me(signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            kill_me(signal.SIGHUP)
            assert signals.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def program(text):
    """A Python process that says when it is ready."""
    return subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


STUCK = """
import ctypes, sys
from iet_sd.engine import stopping
stopping._PATIENCE, stopping._CLEANING = 0.2, 0.2
with stopping.Signals() as signals:
    {mode}
    library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(lock)
    while True:
        try:
            print("ready", flush=True)
            library.pthread_mutex_lock(lock)  # forever, and no signal ends it
        except BaseException:
            pass  # it came before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks itself with Linux's pthreads")
def test_a_process_that_is_stuck_ends_too():
    run = program(STUCK.format(mode="signals.release('All is kept.')"))
    assert run.stdout.readline() == "ready\n"
    run.terminate()
    assert run.wait(timeout=10) == 128 + signal.SIGTERM
    assert run.stderr.read() == "\nStopped by SIGTERM. All is kept.\n"


@pytest.mark.skipif(sys.platform != "linux", reason="locks itself with Linux's pthreads")
def test_a_process_that_holds_is_left_to_finish():
    run = program(STUCK.format(mode="signals.hold()"))
    assert run.stdout.readline() == "ready\n"
    run.terminate()
    time.sleep(0.6)
    assert run.poll() is None
    run.kill()
    run.communicate()


CLEANING = """
import sys, time
from iet_sd.cli.common import status_of
from iet_sd.engine import stopping
stopping._PATIENCE, stopping._CLEANING = 0.2, {patience}

def command():
    with stopping.Signals() as signals:
        signals.release("All is kept.")
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep({takes})
            print("clean", flush=True)

sys.exit(status_of(command, ""))
"""


@pytest.mark.parametrize(
    ("takes", "patience", "said"), [(1, 30, "clean\n"), (60, 0.2, "")], ids=["ends", "hangs"]
)
def test_a_process_that_cleans_up_has_time_to(takes, patience, said):
    run = program(CLEANING.format(takes=takes, patience=patience))
    assert run.stdout.readline() == "ready\n"
    run.terminate()
    output, errors = run.communicate(timeout=10)
    assert (output, errors.strip()) == (said, "Stopped by SIGTERM. All is kept.")
    assert run.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("held", [True, False])
def test_a_child_process_is_on_its_own(held):
    """One that loads data for a step outlives the signal, others end; neither tells the parent."""
    with Signals() as signals:
        if held:
            signals.hold()
        begun, begins = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begins, b"!")
            time.sleep(0.5)
            os._exit(7)
        os.read(begun, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert signals.number is None
    ended = os.waitstatus_to_exitcode(status)
    assert ended == (7 if held else -signal.SIGTERM)


LAUNCHED = """
import os, subprocess, sys
child = '''
import os, signal, sys, time
from iet_sd.engine.stopping import Signals, end_with_launcher
end_with_launcher()
with Signals():
    print(os.getpid(), flush=True)
    time.sleep(20)
'''
environment = {**os.environ, %s}
subprocess.Popen([sys.executable, "-c", child], env=environment).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("by", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "NOBODY"])
def test_the_end_of_the_launcher_ends_what_it_launched(number, by):
    environment = f"'{by}': 'no'"
    launcher = program(LAUNCHED % environment)
    child = int(launcher.stdout.readline())
    launcher.send_signal(number)
    launcher.wait(timeout=10)
    if by == "NOBODY":  # a shell in the background: its end is none of ours
        time.sleep(0.3)
        os.kill(child, signal.SIGKILL)
    said = launcher.stderr.read()  # until the child has ended too
    assert ("Stopped by SIGTERM" in said) == (by != "NOBODY")
