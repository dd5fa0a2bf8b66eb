"""What counts as a caption."""

from typing import Any

from iet_sd.errors import UserError


def texts(value: Any, name: str) -> list[str]:
    """The captions in a cell: a text or a list of texts, without empty ones; [] if missing.

    name: what to call the sample in an error.
    Errors: `UserError` for anything but texts.
    """
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not (entry is None or isinstance(entry, str)):
            raise UserError(
                f"{name}: a caption must be a text or a list of texts; got {entry!r:.60}. "
                "Is --caption_column the right column?"
            )
    return [entry.strip() for entry in entries if entry and entry.strip()]
