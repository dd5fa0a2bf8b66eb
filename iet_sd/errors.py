"""The exceptions that reach a user without a traceback."""

import signal


class UserError(ValueError):
    """A mistake of the user's: says what was expected, what came, and what to do."""


class Stopped(Exception):
    """The run was told to stop by a signal; ``saved`` says whether the round so far is kept."""

    def __init__(self, number: int, saved: bool) -> None:
        kept = (
            "What was done is saved" if saved else "Steps since the last checkpoint are not saved"
        )
        go_on = "go on with --resume_from_checkpoint latest"
        super().__init__(f"Stopped by {signal.Signals(number).name}. {kept}: {go_on}.")
        self.number = number
