"""Folders that can tell whether they are whole: a manifest with the checksums of their files."""

import json
import zlib
from pathlib import Path
from typing import Any

from iet_sd.errors import UserError

MANIFEST = "state.json"


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Write ``state.json``: ``content``, and size and CRC-32 of every file in ``folder``."""
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}
    content = {**content, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**content, "crc": _crc_of(content)}, indent=2))


def unseal(folder: Path) -> dict[str, Any]:
    """The content that a folder was sealed with, its files read and found as they were written.

    Errors: `UserError` that names the folder and what is damaged of it.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        crc, files = content.pop("crc"), content.pop("files")
        whole = crc == _crc_of({**content, "files": files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"its {MANIFEST} is missing or cannot be read") from error
    if not whole:
        raise _damaged(folder, f"its {MANIFEST} is not as it was written")
    bad = [name for name, expected in files.items() if _checksum(folder / name) != expected]
    if bad:
        raise _damaged(folder, f"{', '.join(bad)} missing or not as it was written")
    return content


def _damaged(folder: Path, how: str) -> UserError:
    return UserError(f"{folder} is damaged: {how}.")


def _crc_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _checksum(path: Path) -> list[int] | None:
    """Size and CRC-32 of a file: enough against damage, and as fast as the disk."""
    if not path.is_file():
        return None
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]
