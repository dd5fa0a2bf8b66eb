"""A local folder of images, captioned by metadata files or by text files beside the images.

It is read here and not by datasets' ``imagefolder``, which knows no text files and leaves out
images without a word: those the metadata do not name, and all but ``train.png`` if there is one,
since it takes the name for that of a split.
"""

import csv
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features, Image, List, Value

from iet_sd.config import DataConfig
from iet_sd.config.checks import SURROGATE
from iet_sd.data.captions import texts
from iet_sd.data.checks import fault_of_names, is_filled, listed
from iet_sd.errors import UserError

logger = logging.getLogger("iet_sd")
# Reads each split of what was opened.
Splits = dict[str, Callable[[], Dataset]]
IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECAR_SUFFIXES = (".caption", ".txt")
# Folders of these names at the top hold splits; then all images must lie in such folders.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def walk(root: Path) -> list[Path]:
    """All files under ``root``, sorted, relative to it; hidden ones and their folders left out.

    Links are followed, each folder is read once: where it lies, else by the first link to it.
    """
    found, seen, starts = [], set(), [root]
    for start in starts:
        for folder, subfolders, names in os.walk(start):
            if (real := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(n for n in subfolders if not n.startswith((".", "__MACOSX")))
            # After all that lies here, since a link may lead back to it. os.walk itself takes none.
            starts += [path for n in subfolders if (path := Path(folder, n)).is_symlink()]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path.relative_to(root) for path in found)


def is_image(path: Path) -> bool:
    """Whether a file is taken for an image, by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def open_folder(root: Path, files: list[Path], config: DataConfig) -> Splits:
    """The images of ``root`` with a list of captions each, the metadata's order first; by split.

    Columns: the image (undecoded), the captions, ``sample_id`` (path within ``root``, unless the
    metadata have such a column that names each by its own, or it is asked for), and what else the
    metadata hold, as texts.

    files: what `walk` found.
    Errors: `UserError` for metadata that cannot be read, or as `_by_split`; when a split is read,
    for a caption column that does not exist, or no captions.
    """
    rows = _metadata(root, files)
    # Images no metadata name come last: they may have a text file.
    paths = list(dict.fromkeys([*rows, *filter(is_image, files)]))
    splits = _by_split(paths, root, config.dataset_split)
    return {split: partial(_read, root, rows, paths, config) for split, paths in splits.items()}


def _read(
    root: Path, rows: dict[Path, dict[str, Any]], paths: list[Path], config: DataConfig
) -> Dataset:
    columns = sorted({column for row in rows.values() for column in row} - {"file_name"})
    captions = [
        texts(rows.get(path, {}).get(config.caption_column), path.as_posix())
        or _sidecar(root / path)
        for path in paths
    ]
    if config.caption_column not in columns and not any(captions):
        _explain_no_captions(root, rows, columns, config)
    content: dict[str, list[Any]] = {"sample_id": [path.as_posix() for path in paths]}
    for column in columns:
        values = [rows.get(path, {}).get(column) for path in paths]
        values = [str(value) if is_filled(value) else None for value in values]
        by_chance = column == "sample_id" != config.sample_id_column
        if by_chance and (fault := fault_of_names(values, column)):
            logger.warning("%s Images are named by their paths; see --sample_id_column.", fault)
        else:
            content[column] = values
    files_of = [str(root / path) for path in paths]
    _check_names(files_of)
    features = dict.fromkeys(content, Value("string"))
    features[config.caption_column] = List(Value("string"))
    features[config.image_column] = Image(decode=False)
    content[config.caption_column] = captions
    content[config.image_column] = files_of
    return Dataset.from_dict(content, features=Features(features))


def _check_names(files: list[str]) -> None:
    """`UserError` for names that are not UTF-8: a table cannot hold them."""
    odd = [repr(os.fsencode(file)) for file in files if SURROGATE.search(file)]
    if odd:
        raise UserError(
            f"{len(odd)} of {len(files)} images have a path that is not UTF-8: {listed(odd)}. "
            "Rename them; `convmv -f latin1 -t utf8 -r --notest` does it for a whole folder."
        )


def _by_split(paths: list[Path], root: Path, split: str | None) -> dict[str, list[Path]]:
    """The paths by split: by their folders at the top, if these are named so; else all, as train.

    Errors: `UserError` if some are in folders named as splits and others are not. A class may be
    called train, and a picture may lie beside train/ and test/, but which of it is meant cannot be
    told, and to train on test/ is what nobody would notice. ``split`` is what is asked for.
    """
    splits: dict[str | None, list[Path]] = {}
    for path in paths:
        name = path.parts[0].lower() if len(path.parts) > 1 else ""
        splits.setdefault(SPLIT_FOLDERS.get(name), []).append(path)
    others = splits.pop(None, [])
    if not splits:
        return {"train": others}
    if others:
        folders = {path.parts[0]: name for name, found in splits.items() for path in found}
        own = next((f for f, name in folders.items() if name == split), next(iter(folders)))
        beside = sorted({path.parts[0] + "/" * (len(path.parts) > 1) for path in others})
        raise UserError(
            f"{root}: folders named as splits, {listed(sorted(folders))}, lie beside "
            f"{listed(beside)}. Expected all images in such folders, or none. Move away what is "
            f"beside them, name a folder itself, as by --train_data_dir {root / own}, or rename "
            "folders that are no splits."
        )
    return dict(sorted(splits.items()))


def _explain_no_captions(
    root: Path, rows: dict[Path, dict[str, Any]], columns: list[str], config: DataConfig
) -> None:
    if rows:
        able = [
            column
            for column in columns
            if any(isinstance(row.get(column), str | list) for row in rows.values())
        ]
        advice = f"for example --caption_column {able[0]}" if able else "but none holds texts"
        raise UserError(
            f"--caption_column: the metadata of {root} have no column {config.caption_column!r}. "
            f"Columns found: {', '.join(columns) or 'file_name alone'}; {advice}."
        )
    if config.on_missing_caption != "empty":
        raise UserError(
            f"{root} holds images but no captions. Put a text file beside each image "
            "(cat.png and cat.txt), or one metadata.jsonl into the folder with a line like "
            f'{{"file_name": "cat.png", "{config.caption_column}": "a cat"}} for each. '
            "To train without captions, use --on_missing_caption empty."
        )


def _sidecar(image: Path) -> list[str]:
    """The caption in the text file beside an image, line breaks as spaces."""
    for suffix in SIDECAR_SUFFIXES:
        path = image.with_suffix(suffix)
        if path.is_file():
            return texts(" ".join(_text(path).split()), str(path))
    return []


def _metadata(root: Path, files: list[Path]) -> dict[Path, dict[str, Any]]:
    """The row of every image that a metadata file of the folder names."""
    rows: dict[Path, dict[str, Any]] = {}
    for path in files:
        if path.name not in METADATA_NAMES:
            continue
        for number, row in enumerate(_READERS[path.suffix](root / path), start=1):
            where = f"{root / path}, row {number}"
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{where} has no file_name, the image's path seen from the metadata file. "
                    f"Columns found: {', '.join(row)}."
                )
            image = Path(os.path.normpath(path.parent / name))
            if image.is_absolute() or ".." in image.parts:
                raise UserError(f"{where}: file_name must lead to a file in {root}; got {name!r}.")
            if image in rows:
                raise UserError(
                    f"{where}: {name!r} has a row already. For several captions of one image, "
                    "give a list of them in metadata.jsonl."
                )
            rows[image] = row
    return rows


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    # Not splitlines: it also splits at characters that may stand in a caption, such as U+2028.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        yield read_object(line, f"{path}, line {number}")


def read_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``text``; `UserError`, beginning with ``where``, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    written = json.dumps(content, ensure_ascii=False)
    if found := SURROGATE.search(written):
        around = written[max(found.start() - 20, 0) : found.end() + 20]
        raise UserError(
            f"{where} holds half a character, as where a text was cut or a file name is not UTF-8: "
            f"... {around!r} ... Write it whole, or remove it."
        )
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected {{...}}, got {content!r:.60}")
    return content


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    # Strict, since else a quote that is not closed takes in all the rows that follow.
    rows = csv.DictReader(io.StringIO(_text(path)), strict=True)
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, row {number}, read up to line {rows.reader.line_num}: {error}. "
                'Is a quote not closed? Within a caption in quotes, write "" for each.'
            ) from error
        if row is None:
            return
        if None in row:
            raise UserError(
                f"{path}, row {number} has more values than the header has names. "
                'Put quotes around a caption with commas: "a cat, asleep".'
            )
        yield row


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
