"""Which command of ``python -m iet_sd``."""

import sys
from collections.abc import Sequence

from iet_sd.cli import evaluate
from iet_sd.cli.push import push

COMMANDS = {
    "evaluate": evaluate.evaluate,
    "generate": evaluate.generate,
    "compare": evaluate.compare,
    "push": push,
}
_HELP = """usage: python -m iet_sd COMMAND ...

  evaluate    measure how much of the training set comes back out of a model
  generate    draw the images that evaluate draws, and stop
  compare     compare two evaluated models, paired by prompt and seed
  push        push the result of a training run to the Hub

`python -m iet_sd COMMAND --help` lists the settings of each. Training: train_iet_sd.py.
"""


def main(argv: Sequence[str]) -> int:
    """Run a command; returns the exit status."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if name not in COMMANDS:
        expected = ", ".join(COMMANDS)
        print(f"error: {name} is no command. Expected {expected}.", file=sys.stderr)
        return 2
    return COMMANDS[name](rest)
