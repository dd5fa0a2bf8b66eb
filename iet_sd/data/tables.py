"""Where rows come from: the Hub, parquet files, archives, a data set saved to disk, a folder."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import datasets
import pyarrow
from datasets import Dataset
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from iet_sd.config import DataConfig
from iet_sd.data.archives import read_archives
from iet_sd.data.folder import IMAGE_SUFFIXES, METADATA_NAMES, is_image, read_folder, walk
from iet_sd.errors import UserError

# What `load_dataset` reads: tables also if pictures lie beside them, archives only if none do.
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
    files = walk(path)
    with_images = any(map(is_image, files))
    if _holds(files, TABLE_SUFFIXES) or (not with_images and _holds(files, ARCHIVE_SUFFIXES)):
        with _local(path):
            return _load(str(path), path, config, name=config.dataset_config_name)
    if not with_images:
        raise UserError(
            f"{path} holds no images. Expected files like {', '.join(IMAGE_SUFFIXES)}, in it or "
            "in folders of it, or parquet files, .tar archives, or a data set saved to disk; "
            f"found {len(files)} other files."
        )
    return read_folder(path, files, config)


def _holds(files: list[Path], suffixes: tuple[str, ...]) -> bool:
    return any(file.suffix in suffixes and file.name not in METADATA_NAMES for file in files)


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
