"""WebDataset archives (.tar): the files of a sample lie together and share a name up to a dot.

They are read here and not by datasets' ``webdataset``, which takes its columns from the first
samples: it ends with an error if one of these has no caption, or a .png and not a .jpg. What is
read goes into an Arrow file in the cache, for random access.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from iet_sd.config import DataConfig
from iet_sd.config.checks import SURROGATE
from iet_sd.data.captions import texts
from iet_sd.data.checks import is_filled
from iet_sd.data.folder import IMAGE_SUFFIXES, SIDECAR_SUFFIXES, read_object
from iet_sd.errors import UserError


def read_archives(paths: list[str], config: DataConfig) -> Dataset:
    """The samples of the archives in order, each with a list of captions.

    Columns: the image, the captions (of the JSON's --caption_column, else of the text file),
    ``sample_id`` (the key; with the archive's name if an earlier archive has that key too), and
    the columns of the JSON that settings name, as texts.

    Errors: `UserError` for an archive or JSON that cannot be read, a name that is not UTF-8, a
    sample with two images, or settings that name what no JSON holds.
    """
    named = (config.sample_id_column, config.group_column, config.repeats_column)
    columns = sorted({name for name in named if name} - {"sample_id"})
    features = {
        "sample_id": Value("string"),
        config.image_column: Image(decode=False),
        config.caption_column: List(Value("string")),
        **dict.fromkeys(columns, Value("string")),
    }
    return Dataset.from_generator(
        _rows,
        features=Features(features),
        cache_dir=config.cache_dir,
        gen_kwargs={
            # datasets knows by them whether the cache still holds these archives. Tuples, since
            # it takes lists for what processes could share.
            "archives": tuple((path, *_state(Path(path))) for path in paths),
            "image_column": config.image_column,
            "caption_column": config.caption_column,
            "columns": tuple(columns),
        },
    )


def _state(path: Path) -> tuple[int, int]:
    """Size, and time of the last change."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _rows(
    archives: tuple[tuple[str, int, int], ...],
    image_column: str,
    caption_column: str,
    columns: tuple[str, ...],
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    found: set[str] = set()
    captioned = False
    for path in (Path(archive[0]) for archive in archives):
        here: set[str] = set()
        for key, files in _samples(path):
            where = f"{path.name}, sample {key}"
            if SURROGATE.search(key):
                raise UserError(
                    f"{path.name}: the name of sample {os.fsencode(key)} is not UTF-8. "
                    "Pack its files again under another name."
                )
            if key in here:
                raise UserError(f"{where}: its files do not lie together in the archive.")
            here.add(key)
            described = _json(files, where)
            found |= described.keys()
            captions = texts(described.get(caption_column), where) or _sidecar(files, where)
            captioned |= bool(captions)
            values = {column: described.get(column) for column in columns}
            yield {
                "sample_id": f"{path.name}/{key}" if key in seen else key,
                image_column: _image(files, image_column, where),
                caption_column: captions,
                **{name: str(v) if is_filled(v) else None for name, v in values.items()},
            }
        seen |= here
    missing = [name for name in columns if name not in found]
    if missing or not (captioned or caption_column in found or not found):
        raise UserError(
            f"no .json of the archives has {(missing or [caption_column])[0]!r}. They hold "
            f"{', '.join(sorted(found)) or 'nothing'}; name one with --caption_column."
        )


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key of every sample, and its files by what their names have after the key's dot."""
    key, files = None, {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                own = f"{folder}/{stem}" if folder else stem
                if own != key and key is not None:
                    yield key, files
                    files = {}
                key = own
                files[suffix.lower()] = archive.extractfile(member).read()
            # Where tarfile has stopped, without a word if the file was cut off between two members.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of data")
    except (OSError, EOFError, tarfile.TarError) as error:
        after = f" after sample {key}" if key else ""
        raise UserError(f"{path.name} cannot be read{after}: {error}") from error
    if key is not None:
        yield key, files


def _image(files: dict[str, bytes], column: str, where: str) -> dict[str, Any] | None:
    """The only image, or of several the one that --image_column names."""
    names = [name for name in files if f".{name}" in IMAGE_SUFFIXES]
    names = [name for name in names if name == column] or names
    if len(names) > 1:
        raise UserError(
            f"{where} has {len(names)} images, {', '.join(names)}: name one with --image_column."
        )
    # Without a path: datasets would read a file of that name instead, if there is one.
    return {"bytes": files[names[0]], "path": None} if names else None


def _json(files: dict[str, bytes], where: str) -> dict[str, Any]:
    return read_object(files["json"], f"{where}: its .json") if "json" in files else {}


def _sidecar(files: dict[str, bytes], where: str) -> list[str]:
    """The caption in a text file, line breaks as spaces."""
    for name in (suffix.removeprefix(".") for suffix in SIDECAR_SUFFIXES):
        if name in files:
            try:
                content = files[name].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: its .{name} is not UTF-8 text: {error}") from error
            return texts(" ".join(content.split()), where)
    return []
