"""Pushing the result of a round while training goes on, by a process that nobody waits for.

A process and not a thread: it can be ended at any time, it takes no time from training's own
interpreter, and what it holds open is not there when data workers are forked. Its stdin is a pipe
from training, and it ends when that does, however: else it might read what the next run writes, or
commit a round over the result of that.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import iet_sd
from iet_sd.hub.contents import PENDING
from iet_sd.hub.push import Repository, in_shell

logger = logging.getLogger("iet_sd")


@dataclass(frozen=True)
class _Push:
    """One push under way: its process, and what that says."""

    round: int
    process: subprocess.Popen
    output: IO[str]

    def last_line(self) -> str:
        self.output.seek(0)
        return (self.output.read().strip().splitlines() or ["it said nothing"])[-1]

    def close(self) -> None:
        self.process.stdin.close()
        self.output.close()


class BackgroundPush:
    """One push at a time; a round that comes while one is under way is left out."""

    def __init__(self, repository: Repository, output_dir: Path) -> None:
        """Begin, without what a run that was killed has left in ``output_dir``.

        The result of a round lies there while it is pushed, each in a folder of its own.
        """
        self.repository = repository
        self.output_dir = output_dir
        self._push: _Push | None = None
        self._clear()

    def is_free(self) -> bool:
        """Whether a push could start; tells of one that has ended since the last call."""
        push = self._push
        if push is None:
            return True
        if push.process.poll() is None:
            return False
        if push.process.returncode:
            logger.warning(
                "round %d was not pushed: %s. Training goes on, and pushes its result at the end. "
                "To push it later: %s",
                push.round,
                push.last_line().removeprefix("error: ").rstrip("."),
                in_shell(self.repository.arguments(self.output_dir)),
            )
        else:
            logger.info("round %d: %s", push.round, push.last_line())
        self._clear()
        return True

    def start(self, round: int, save: Callable[[Path], None]) -> None:
        """Push what ``save`` writes into a folder, and return once that is written.

        Errors: those of ``save``, and `OSError` where there can be no other process; nothing stays.
        """
        pending = self.output_dir / PENDING
        try:
            pending.mkdir()
            folder = Path(tempfile.mkdtemp(prefix=f"round-{round}-", dir=pending))
            save(folder)
            self._push = self._launched(round, folder)
        except BaseException:
            self._clear()
            raise

    def close(self) -> None:
        """End a push that is under way, which leaves the repository as it was."""
        if not self.is_free():
            self._push.process.terminate()
            self._push.process.wait()
            logger.info("the push of round %d was broken off", self._push.round)
            self._clear()

    def _launched(self, round: int, folder: Path) -> _Push:
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "iet_sd.hub.child", folder, self.repository.repo_id],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Not for the keys of our terminal.
                start_new_session=True,
                env=self._environment(),
            )
        except BaseException:
            output.close()
            raise
        return _Push(round, process, output)

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
        """When nobody reads the folder any more."""
        if self._push is not None:
            self._push.close()
        self._push = None
        shutil.rmtree(self.output_dir / PENDING, ignore_errors=True)
