"""Writes that are whole or absent: a reader, or a run that was killed, never meets half of one."""

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from iet_sd.errors import UserError

_STAGING = ".partial"
# Of the staging file of an `atomic_file`, whichever its path.
_STAGING_FILE = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(_STAGING)}")


def check_writable(folder: Path, flag: str = "--output_dir") -> None:
    """Make ``folder`` if it is not there, and see that a file can be written into it.

    Errors: `UserError`, calling it by ``flag``, whatever the reason. Nothing but the folder stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise UserError(f"{flag} {folder} is a file; give a folder.") from error
        raise UserError(
            f"{flag} {folder} cannot be written to: {error.strerror}. Give a folder that you may "
            "write to, on a disk with room."
        ) from error


def free_bytes(folder: Path) -> int:
    """What may still be written into ``folder``, which need not be there yet. Nothing is made.

    Errors: `OSError` where nothing may be.
    """
    folder = Path(os.path.abspath(folder))
    with suppress(FileNotFoundError):
        os.stat(folder)
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    with tempfile.TemporaryFile(dir=there):  # rights alone don't tell: see /proc, or a share
        return shutil.disk_usage(there).free


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A staging folder to write into, moved to ``path`` when the block ends without an error.

    A new ``path`` appears with one rename. An existing one is merged into: each entry of the
    staging folder replaces the entry of its name as a whole, folders first and files last (so
    the ``model_index.json`` of a pipeline comes after the parts it names), and entries of other
    names stay. After an error in the block ``path`` is as it was.

    What a killed run left behind in the staging folder goes away with the next write.
    """
    staging = new_staging(path)
    try:
        yield staging
        publish(path)
    finally:
        if staging.exists():
            shutil.rmtree(staging)


def new_staging(path: Path | str) -> Path:
    """Make the staging folder of ``path``, empty; the first half of `atomic_folder`.

    Where it lies depends on whether ``path`` exists, so nobody may create or delete ``path``
    before `publish`. Several processes can write into `staging_for` the path.
    """
    staging = staging_for(path)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(path: Path | str) -> None:
    """Move what lies in the staging folder of ``path`` to ``path``; the second half.

    All files get the rights that the user's umask gives.
    """
    path = Path(os.path.abspath(path))
    staging = staging_for(path)
    # As the folder has them: to ask for the umask itself is to change it for all threads.
    rights = stat.S_IMODE(staging.stat().st_mode) & 0o666
    for folder, _, names in os.walk(staging):
        for name in names:
            _give_rights(os.path.join(folder, name), rights)
            _sync(os.path.join(folder, name))
        _sync(folder)
    if path.is_dir():
        for entry in sorted(staging.iterdir(), key=lambda entry: (entry.is_file(), entry.name)):
            _swap_in(entry, path / entry.name)
        _sync(path)
    else:
        os.rename(staging, path)
        _sync(path.parent)


def staging_for(path: Path | str) -> Path:
    """The staging folder of ``path``."""
    path = Path(os.path.abspath(path))
    # Inside an existing folder, since that may be a mount point: renames need one file system.
    return path / _STAGING if path.is_dir() else path.with_name(f".{path.name}{_STAGING}")


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write, moved to ``path`` when the block ends without an error.

    After an error ``path`` is as it was. Writers of one path do not disturb each other: the last to
    end wins. What a killed one left stays until `remove_leftovers`.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # By chance, as a process in another container may have the number of this one.
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_STAGING}")
    try:
        with staging.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    _sync(path.parent)


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8) to the file ``path``, or leave what was there; as `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers of files left in ``folder``, where nobody else may write now."""
    for path in folder.iterdir():
        if _STAGING_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()


def _swap_in(new: Path, target: Path) -> None:
    """Move ``new`` to ``target``; a folder there steps aside first, as no rename replaces it."""
    if not target.is_dir():
        os.replace(new, target)
        return
    retired = new.with_name(f"{new.name}.retired")
    os.rename(target, retired)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(retired, target)
        raise


def _give_rights(path: str, rights: int) -> None:
    """Set a file's rights: safetensors writes files that no one else may read."""
    # File systems without rights refuse to change what they show.
    if stat.S_IMODE(os.stat(path).st_mode) != rights:
        os.chmod(path, rights)


def _sync(path: Path | str) -> None:
    """Have the disk hold a file's content, or a folder's list of names."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows opens no folders, and writes their entries through by itself
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
