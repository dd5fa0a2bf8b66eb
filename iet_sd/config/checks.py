"""Checks of single values, used by all settings."""

from typing import Any

from iet_sd.errors import UserError


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
