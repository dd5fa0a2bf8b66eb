"""The one exception that reaches a user without a traceback."""


class UserError(ValueError):
    """A mistake of the user's: says what was expected, what came, and what to do."""
