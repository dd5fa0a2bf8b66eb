"""The training script in processes of its own, as people start it."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train_iet_sd.py"


class Launched:
    """``accelerate launch`` of a script, or ("-m", module); with ``processes`` 0, it alone.

    Alone it keeps to one thread; a lone process that accelerate launches takes all cores.
    """

    def __init__(self, argv, processes=1, script=SCRIPT):
        launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--quiet"]
        launch += ["--num_processes", str(processes), "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no"]
        if processes > 1:
            launch += ["--multi_gpu", "--main_process_port", "0"]
        target = script if isinstance(script, tuple) else (str(script),)
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.launcher = subprocess.Popen(
            [sys.executable, *(launch if processes else []), *target, *argv],
            start_new_session=True,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # One thread in each, since the number of threads changes the order of sums.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        self._seen = set()

    def alive(self):
        """Whether it runs, and not only what it has left behind."""
        return self.launcher.poll() is None

    def output(self):
        """What all processes have said so far."""
        self._output.seek(0)
        return self._output.read()

    def until(self, condition, seconds=300):
        """Wait until it holds; fail if the run ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.alive(), self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)

    def processes(self):
        """The launcher and all processes below it, which may be in sessions of their own."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.launcher.pid)
            self._seen |= {top, *top.children(recursive=True)}
        return self._seen

    def kill(self):
        """SIGKILL to all processes at about the same time, before they can tell each other."""
        for process in sorted(self.processes(), key=lambda p: p.pid, reverse=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()

    def wait(self, seconds=300):
        """Wait until all processes that were ever seen have ended; the launcher's status."""
        status = self.launcher.wait(seconds)
        _, alive = psutil.wait_procs(self._seen, timeout=seconds)
        assert not alive, self.output()
        return status


def finish(argv, processes=1):
    """Run to the end; what it has said."""
    run = Launched(argv, processes)
    assert run.wait() == 0, run.output()
    return run.output()
