"""Pushing the result of a round while training goes on, by a process that nobody waits for.

A process and not a thread: it can be ended at any time, it takes no time from training's own
interpreter, and what it holds open is not there when data workers are forked.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import iet_sd
from iet_sd.hub.contents import PENDING
from iet_sd.hub.push import Repository, in_shell

logger = logging.getLogger("iet_sd")


class BackgroundPush:
    """One push at a time; a round that comes while one is under way is left out."""

    def __init__(self, repository: Repository, output_dir: Path) -> None:
        """``output_dir``: where the result of a round lies while it is pushed."""
        self.repository = repository
        self.folder = output_dir / PENDING
        self._round = 0
        self._process: subprocess.Popen | None = None
        self._output: IO[str] | None = None

    def is_free(self) -> bool:
        """Whether a push could start; tells of one that has ended since the last call."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        self._output.seek(0)
        last = (self._output.read().strip().splitlines() or ["it said nothing"])[-1]
        if self._process.returncode:
            logger.warning(
                "round %d was not pushed: %s. Training goes on, and pushes its result at the end. "
                "To push it later: %s",
                self._round,
                last.removeprefix("error: ").rstrip("."),
                in_shell(self.repository.arguments(self.folder.parent)),
            )
        else:
            logger.info("round %d: %s", self._round, last)
        self._clear()
        return True

    def start(self, round: int, save: Callable[[Path], None]) -> None:
        """Push what ``save`` writes into a folder, and return once that is written.

        Errors: those of ``save``, and `OSError` where there can be no other process; nothing stays.
        """
        self._clear()
        try:
            self.folder.mkdir()
            save(self.folder)
            self._launch(round)
        except BaseException:
            self._clear()
            raise

    def _launch(self, round: int) -> None:
        self._round, self._output = round, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *self.repository.arguments(self.folder)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # Not for the keys of our terminal.
            start_new_session=True,
            env=self._environment(),
        )

    def close(self) -> None:
        """End a push that is under way, which leaves the repository as it was."""
        if not self.is_free():
            self._process.terminate()
            self._process.wait()
            logger.info("the push of round %d was broken off", self._round)
        self._clear()

    def _environment(self) -> dict[str, str]:
        """With the token, which no command line may hold; it is no process of a launch."""
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        kept = {k: v for k, v in os.environ.items() if k not in launched}
        path = [str(Path(iet_sd.__file__).parent.parent), *filter(None, [kept.get("PYTHONPATH")])]
        return kept | {
            "HF_TOKEN": self.repository.token,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(path),
        }

    def _clear(self) -> None:
        if self._output is not None:
            self._output.close()
        self._process = self._output = None
        shutil.rmtree(self.folder, ignore_errors=True)
