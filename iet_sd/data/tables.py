"""Where rows come from: the Hub, parquet files, archives, a data set saved to disk, a folder."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
from iet_sd.data.folder import IMAGE_SUFFIXES, METADATA_NAMES, is_image, read_folder, walk
from iet_sd.errors import UserError

TABLE_SUFFIXES = (".parquet", ".arrow")
ARCHIVE_SUFFIXES = (".tar", ".zip")
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

    Errors: `UserError` if nothing is there or it cannot be read.
    """
    path = Path(config.train_data_dir or config.dataset_name or "").expanduser()
    if path.exists():
        return _read_local(path, config)
    if config.train_data_dir:
        raise UserError(f"--train_data_dir {path}: no such folder or file.")
    return _read_hub(config)


def _read_local(path: Path, config: DataConfig) -> Dataset:
    if path.is_file():
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix)
        if kind is None:
            raise UserError(f"{path}: expected a folder, a .parquet file or a .tar archive.")
        with _local(path):
            return _load(kind, path, config, data_files=str(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with _local(path):
            content = datasets.load_from_disk(str(path))
        return _split_of(content, config, path)
    return _read_directory(path, walk(path), config)


def _read_directory(path: Path, files: list[Path], config: DataConfig) -> Dataset:
    """What its files hold: tables that hold images, else images, else archives.

    So a table of other things, as img2dataset writes beside images and archives, hides neither;
    nor does an archive that lies beside images.

    files: what `walk` found. Errors: `UserError`, also if there is none of these.
    """
    names = [f for f in files if f.suffix in TABLE_SUFFIXES and f.name not in METADATA_NAMES]
    schemas = ((path / name, _schema(path / name)) for name in names)
    table = next((table for table, schema in schemas if _holds_images(schema)), None)
    if table is not None:
        return _read_tables(path, table, config)
    if any(map(is_image, files)):
        return read_folder(path, files, config)
    suffixes = {file.suffix for file in files}
    if ".tar" in suffixes and not _is_described(path):
        return _read_archives(path, config)
    if not suffixes.isdisjoint(ARCHIVE_SUFFIXES):
        with _local(path):
            return _load(str(path), path, config, name=config.dataset_config_name)
    found = f"{len(files)} other files"
    if names:
        columns = ", ".join(_schema(path / names[0]).names)
        found += f", of which {names[0]} has no column of images, only {columns}"
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


def _read_tables(path: Path, table: Path, config: DataConfig) -> Dataset:
    """The tables of a folder, which are read because of the images in ``table``."""
    with _local(path):
        rows = _load(str(path), path, config, name=config.dataset_config_name)
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


def _read_archives(path: Path, config: DataConfig) -> Dataset:
    """The .tar archives of a folder, split by their names as `load_dataset` splits files.

    It is not asked itself, since it counts files: of as many .json it would read these.
    """
    only = {"base_path": str(path.absolute()), "allowed_extensions": [".tar"]}
    with _local(path):
        patterns = _get_data_files_patterns(partial(resolve_pattern, **only))
        archives = _split_of(DataFilesDict.from_patterns(patterns, **only), config, path)
        return read_archives(list(archives), config)


def _read_hub(config: DataConfig) -> Dataset:
    name = config.dataset_name
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"--dataset_name {name}: no such folder, and not a name on the Hub.")
    try:
        return _load(name, name, config, name=config.dataset_config_name)
    except _READ_ERRORS as error:
        if mistake := _mistake_in(error):
            raise mistake from error
        raise UserError(
            f"--dataset_name {name}: no such folder here, and the Hub answered: "
            f"{_message(error)} If it is a folder, check the path; if it is on the Hub, check "
            "the name, the network, and `hf auth login` for private data sets."
        ) from error


def _load(source: str, place: str | Path, config: DataConfig, **options: Any) -> Dataset:
    """What `datasets.load_dataset` reads; archives as `read_archives` does."""
    builder = datasets.load_dataset_builder(source, cache_dir=config.cache_dir, **options)
    if isinstance(builder, WebDataset):
        archives = _split_of(builder.config.data_files, config, place)
        cache = config.cache_dir and str(Path(config.cache_dir, "downloads"))
        manager = datasets.DownloadManager(
            download_config=datasets.DownloadConfig(cache_dir=cache),
        )
        return read_archives(manager.download(list(archives)), config)
    builder.download_and_prepare()
    return _split_of(builder.as_dataset(), config, place)


def _split_of(content: Any, config: DataConfig, place: str | Path) -> Any:
    """The split that is asked for, of what there is: a mapping, or a data set of one."""
    splits = {str(content.split or "train"): content} if isinstance(content, Dataset) else content
    if config.dataset_split not in splits:
        raise UserError(
            f"--dataset_split {config.dataset_split}: {place} has no such split, "
            f"only {list(splits)}."
        )
    return splits[config.dataset_split]


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
