"""Checks of single values, used by all settings."""

import re
from typing import Any

from iet_sd.errors import UserError

# Half of a character that is written in two, which JSON may hold and a table may not; Python also
# puts one in place of each byte of a file name or an argument that is not UTF-8.
SURROGATE = re.compile("[\ud800-\udfff]")


def positive(config: Any, *names: str) -> None:
    """Every value that is given must be above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0; got {value}.")


def not_negative(config: Any, *names: str) -> None:
    """Every value must be 0 or above."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name} must not be negative; got {getattr(config, name)}.")


def below_one(config: Any, *names: str) -> None:
    """Every value must be a share below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} must lie in [0, 1); got {getattr(config, name)}.")


def whole_characters(config: Any, *names: str) -> None:
    """Every text of the lists that are given must be one that can be written and tokenized."""
    for name in names:
        if odd := next(filter(SURROGATE.search, getattr(config, name) or ()), None):
            raise UserError(
                f"--{name} holds half a character, as where a text was cut or is not UTF-8: "
                f"{odd!r}. Write it whole, or remove it."
            )
