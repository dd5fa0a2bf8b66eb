"""Where rows come from: the Hub, parquet files, archives, a data set saved to disk, a folder."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import datasets
import pyarrow.parquet
import yaml
from datasets import Dataset
from datasets.data_files import DataFilesDict, _get_data_files_patterns, resolve_pattern
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import metadata_load

from iet_sd.config import DataConfig
from iet_sd.data import checks
from iet_sd.data.archives import read_archives
from iet_sd.data.folder import (
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    Splits,
    is_image,
    open_folder,
    walk,
)
from iet_sd.errors import UserError

# Turns errors of what is read within into `UserError`.
Guard = Callable[[], AbstractContextManager[None]]
TABLE_SUFFIXES = (".parquet", ".arrow")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    pyarrow.ArrowException,
    yaml.YAMLError,
    datasets.exceptions.DatasetsError,
)


def read_rows(config: DataConfig) -> Dataset:
    """All rows of the split the settings name, images not decoded.

    Errors: as `require_split`, and `UserError` if it cannot be read.
    """
    return require_split(config)()


def require_split(config: DataConfig) -> Callable[[], Dataset]:
    """What reads the split the settings name, or where they name none the only one there is.

    Errors: `UserError` if nothing is there, or no such split, or not one alone.
    """
    splits, split = _open(config), config.dataset_split
    flag = "train_data_dir" if config.train_data_dir else "dataset_name"
    place = config.train_data_dir or config.dataset_name
    if split is None and len(splits) > 1:
        raise UserError(
            f"--{flag} {place}: expected a single split, found {list(splits)}. Give what holds "
            "one of them alone: its folder, or its file."
        )
    if split is not None and split not in splits:
        raise UserError(f"--dataset_split {split}: {place} has no such split, only {list(splits)}.")
    return splits[split] if split is not None else next(iter(splits.values()))


def _open(config: DataConfig) -> Splits:
    path = Path(config.train_data_dir or config.dataset_name or "").expanduser()
    if path.exists():
        return _open_local(path, config)
    if config.train_data_dir:
        raise UserError(f"--train_data_dir {path}: no such folder or file.")
    name = config.dataset_name
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"--dataset_name {name}: no such folder, and not a name on the Hub.")
    return _built(partial(_hub, name), name, config, name=config.dataset_config_name)


def _open_local(path: Path, config: DataConfig) -> Splits:
    if path.is_file():
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix)
        if kind is None:
            raise UserError(f"{path}: expected a folder, a .parquet file or a .tar archive.")
        return _built(partial(_local, path), kind, config, data_files=str(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with _local(path):
            content = datasets.load_from_disk(str(path))
        return _in_memory(
            {content.split or "train": content} if isinstance(content, Dataset) else content
        )
    return _open_directory(path, walk(path), config)


def _open_directory(path: Path, files: list[Path], config: DataConfig) -> Splits:
    """What its files hold: tables that hold images, else images, else archives.

    So a table of other things, as img2dataset writes beside images and archives, hides neither;
    nor does an archive that lies beside images.

    files: what `walk` found. Errors: `UserError`, also if there is none of these.
    """
    tables = [
        path / f for f in files if f.suffix in TABLE_SUFFIXES and f.name not in METADATA_NAMES
    ]
    pictured = [table for table in tables if _holds_images(_schema(table))]
    archives = [path / file for file in files if file.suffix == ".tar"]
    if not pictured and any(map(is_image, files)):
        return open_folder(path, files, config)
    if (pictured or archives) and not _is_described(path):
        if pictured:
            return _open_tables(path, pictured, config)
        return _open_archives(path, archives, config)
    if pictured or archives or any(file.suffix == ".zip" for file in files):
        return _built(partial(_local, path), str(path), config, name=config.dataset_config_name)
    found = f"{len(files)} other files"
    if tables:
        columns = ", ".join(_schema(tables[0]).names)
        found += f", of which {tables[0]} has no column of images, only {columns}"
    raise UserError(
        f"{path} holds no images. Expected files like {', '.join(IMAGE_SUFFIXES)}, in it or "
        "in folders of it, or parquet files with images, .tar archives, or a data set saved to "
        f"disk; found {found}."
    )


def _schema(table: Path) -> pyarrow.Schema:
    """Columns of a table; none of its rows is read."""
    try:
        if table.suffix == ".parquet":
            return pyarrow.parquet.read_schema(table)
        with pyarrow.memory_map(str(table)) as file:
            try:
                return pyarrow.ipc.open_stream(file).schema
            except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
                return pyarrow.ipc.open_file(file).schema
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{table} cannot be read: {error} Repair it, or move it away if it is not of the data."
        ) from error


def _holds_images(schema: pyarrow.Schema) -> bool:
    """Whether any column may be of images: `checks.is_image`, before datasets has read it."""
    types = pyarrow.types
    return any(
        {"bytes", "path"} <= {field.name for field in kind}
        if types.is_struct(kind)
        else types.is_binary(kind) or types.is_large_binary(kind)
        for kind in schema.types
    )


def _open_tables(path: Path, tables: list[Path], config: DataConfig) -> Splits:
    """Tables with images; those of the first one's format."""
    alike = [table for table in tables if table.suffix == tables[0].suffix]
    files, kind = _by_split(path, alike), alike[0].suffix.removeprefix(".")
    splits = _built(partial(_local, path), kind, config, data_files=files)
    return {s: partial(_with_images, read, alike[0], config) for s, read in splits.items()}


def _with_images(read: Callable[[], Dataset], table: Path, config: DataConfig) -> Dataset:
    """Rows of a folder's tables, which are read because of the images in ``table``."""
    rows = read()
    try:
        checks.require_column(rows, "image_column", config.image_column, "images", checks.is_image)
    except UserError as error:
        raise UserError(
            f"{error} Tables are read, since {table} has images or bytes: if it is not of the "
            "data, move it away."
        ) from error
    return rows


def _is_described(path: Path) -> bool:
    """Whether a card says which files are which split, as in a data set from the Hub."""
    card = path / "README.md"
    with _local(path):
        return card.is_file() and "configs" in (metadata_load(card) or {})


def _open_archives(path: Path, archives: list[Path], config: DataConfig) -> Splits:
    guard, splits = partial(_local, path), _by_split(path, archives)
    return {split: partial(_fetched, guard, files, config) for split, files in splits.items()}


def _by_split(path: Path, files: list[Path]) -> dict[str, list[str]]:
    """These files of a folder by the splits that their names tell, as `load_dataset` tells them.

    It is not asked itself, since it reads the files of the kind that it counts most of.
    """
    wanted = {os.path.realpath(file) for file in files}
    only = {"base_path": str(path.absolute()), "allowed_extensions": [files[0].suffix]}

    def among(pattern: str) -> list[str]:
        found = resolve_pattern(pattern, **only)
        return [file for file in found if os.path.realpath(file) in wanted]

    with _local(path):
        patterns = _get_data_files_patterns(among)
        found = DataFilesDict.from_patterns(patterns, **only)
    return {
        str(split): [file for file in named if os.path.realpath(file) in wanted]
        for split, named in found.items()
    }


def _built(guard: Guard, source: str, config: DataConfig, **options: Any) -> Splits:
    """What `datasets.load_dataset` reads; archives as `read_archives` does."""
    with guard():
        builder = datasets.load_dataset_builder(source, cache_dir=config.cache_dir, **options)
        if isinstance(builder, WebDataset):
            archives = builder.config.data_files
            return {str(s): partial(_fetched, guard, list(a), config) for s, a in archives.items()}
        builder.download_and_prepare()
        return _in_memory(builder.as_dataset())


def _fetched(guard: Guard, archives: list[str], config: DataConfig) -> Dataset:
    """The samples of archives here or on the Hub."""
    cache = config.cache_dir and str(Path(config.cache_dir, "downloads"))
    with guard():
        manager = datasets.DownloadManager(
            download_config=datasets.DownloadConfig(cache_dir=cache),
        )
        return read_archives(manager.download(archives), config)


def _in_memory(content: Mapping[Any, Dataset]) -> Splits:
    return {str(split): (lambda rows=rows: rows) for split, rows in content.items()}


@contextmanager
def _local(path: Path) -> Iterator[None]:
    """Reads without the bars and logs of datasets, and turns its errors into `UserError`."""
    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except _READ_ERRORS as error:
        if mistake := _mistake_in(error):
            raise mistake from error
        raise UserError(f"{path} cannot be read as a data set: {_message(error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """Turns errors of the Hub, and of what was read there, into `UserError`."""
    try:
        yield
    except _READ_ERRORS as error:
        if mistake := _mistake_in(error):
            raise mistake from error
        raise UserError(
            f"--dataset_name {name}: no such folder here, and the Hub answered: "
            f"{_message(error)} If it is a folder, check the path; if it is on the Hub, check "
            "the name, the network, and `hf auth login` for private data sets."
        ) from error


def _mistake_in(error: BaseException | None) -> UserError | None:
    """The `UserError` that datasets has wrapped, if it is one."""
    while not (error is None or isinstance(error, UserError)):
        error = error.__cause__
    return error


def _message(error: BaseException) -> str:
    """What the error at the root says, since datasets wraps it in one that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = shorten(str(error) or type(error).__name__, 300).rstrip(".") + "."
    if "config" in text.lower():
        text += " A configuration is named by --dataset_config_name."
    return text
