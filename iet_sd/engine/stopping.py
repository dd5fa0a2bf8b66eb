"""How a run is told to stop: SIGTERM, Ctrl-C, a closed terminal, or the end of its launcher.

A signal ends what can be ended at once, and lets what would be lost be saved first.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

from iet_sd.errors import Stopped

_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]
# Of environment variables that a launcher sets: accelerate's, and torchrun's, which it may use.
_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_PR_SET_PDEATHSIG = 1
# Seconds for the main thread to take note, which it cannot while it waits for other processes; and
# then to clean up: a tracker that ends, or proxies on disk that are deleted, may take minutes.
_PATIENCE, _CLEANING = 5, 300


class Signals:
    """A context in which a signal raises `Stopped`: at once, or when `release` is called if held.

    Only the first counts, but for a Ctrl-C after it, which ends the process as it always does.
    A main thread that is stuck, such as in a wait for another process, cannot raise anything: then
    a thread of ours ends the process with the same message and status. It also ends one that could
    raise `Stopped`, but is still there when there has been ample time to clean up.
    """

    def __init__(self) -> None:
        """Nothing is caught before the context is entered."""
        self.number: int | None = None
        """The signal that came."""
        self._held = False
        self._kept = ""
        self._before: dict[int, object] = {}

    def hold(self) -> None:
        """From now on, only note a signal."""
        self._held = True

    def release(self, kept: str | None = None) -> None:
        """From now on, end at once, saying what is kept, or what was said before.

        Errors: `Stopped` if one has come.
        """
        self._held = False
        if kept is not None:
            self._kept = kept
        if self.number is not None:
            raise Stopped(self.number, self._kept)

    def __enter__(self) -> "Signals":
        # A signal that is ignored, as by nohup, stays so.
        numbers = [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
        self._before = {n: signal.signal(n, self._note) for n in numbers}
        # The C side of a handler writes here, whatever the main thread does.
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        writer = self._writer.fileno()
        self._wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._let_go)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            if not self._held:
                raise Stopped(number, self._kept)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def _watch(self, reader: socket.socket) -> None:
        while came := reader.recv(1):
            (number,) = came
            if number not in self._before:
                continue  # such as of a child that has ended
            time.sleep(_PATIENCE)
            if self.number is not None:  # the main thread has seen to it
                time.sleep(_CLEANING)
            if self._before and not self._held:
                print(f"\n{Stopped(number, self._kept)}", file=sys.stderr, flush=True)
                os._exit(128 + number)

    def _let_go(self) -> None:
        """In a child process: its signals are its own. One that loads data must not end early."""
        if self._before:
            signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._held else handler)
        self._before = {}


def end_with_launcher() -> None:
    """Have Linux send SIGTERM to this process when the launcher that started it ends.

    ``accelerate launch`` does not pass SIGTERM on, and nothing can pass on a SIGKILL.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in _LAUNCHERS):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGTERM)  # it ended before we asked
