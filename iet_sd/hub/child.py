"""``python -m iet_sd.hub.child FOLDER REPOSITORY``: push a round for training, and end with it.

Training has made the repository; the token is in HF_TOKEN. Says the outcome on its last line.
"""

import os
import sys
import threading
from pathlib import Path

from iet_sd.errors import PushFailed, UserError
from iet_sd.hub.push import Repository, push


def _end_with_stdin() -> None:
    """End at once when nobody holds the other end of stdin any more; a commit is whole or not."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # holds no lock that Python's own end would wait for
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: str, repo_id: str) -> int:
    """Push; returns the exit status."""
    _end_with_stdin()
    repository = Repository(repo_id, private=False, token=os.environ["HF_TOKEN"])
    try:
        print(push(Path(folder), repository, "A round of training with iet_sd"))
    except (PushFailed, UserError) as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
