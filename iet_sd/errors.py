"""The exceptions that reach a user without a traceback."""

import signal


class UserError(ValueError):
    """A mistake of the user's: says what was expected, what came, and what to do."""


class PushFailed(Exception):
    """A result is whole on disk, and did not get to the Hub: says why, and maybe what to do."""


class Stopped(BaseException):
    """The run was told to stop by a signal; no error, so no ``except Exception`` may catch it."""

    def __init__(self, number: int, kept: str) -> None:
        """``kept``: a sentence on what of the run is saved, or nothing."""
        super().__init__(f"Stopped by {signal.Signals(number).name}. {kept}".rstrip())
        self.number = number
