"""The training script on a slow disk, so that there is time to kill it in the middle of writing."""

import sys
import time

from iet_sd import files
from iet_sd.cli.train import train

_sync = files._sync


def slow_sync(path):
    time.sleep(0.02)
    _sync(path)


if __name__ == "__main__":
    files._sync = slow_sync
    sys.exit(train(sys.argv[1:]))
