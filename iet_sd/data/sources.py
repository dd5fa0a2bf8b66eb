"""The training data as one table: images, captions, stable names, and groups of near-duplicates."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Dataset
from torch import Tensor

from iet_sd.config import DataConfig
from iet_sd.config.buckets import Size, nearest
from iet_sd.data import checks
from iet_sd.data.groups import group
from iet_sd.data.shards import batches_per_epoch
from iet_sd.data.tables import read_rows
from iet_sd.data.transforms import cover
from iet_sd.errors import UserError

logger = logging.getLogger("iet_sd")
# Taken for names without being asked for, if it serves.
_SAMPLE_ID = "sample_id"


def load_source(config: DataConfig) -> "Source":
    """The data that the settings name, checked.

    Names of samples: --sample_id_column, else a column ``sample_id`` that names each by its own,
    else in a folder of images their paths, else positions in the data set. Groups: images that
    share what --group_column says, or their bytes if all are checked (`group`).
    --max_train_samples takes the first rows, before any is left out.

    Errors: one `UserError` for a mistake, with all the samples it concerns.
    """
    rows = read_rows(config)
    checks.require_column(rows, "image_column", config.image_column, "images", checks.is_image)
    checks.require_column(rows, "caption_column", config.caption_column, "texts", checks.is_text)
    rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    # Of all rows, so that what a sample is called does not depend on how many are taken.
    names = _sample_ids(rows, config)
    if config.max_train_samples is not None:
        rows = rows.select(range(min(config.max_train_samples, len(rows))))
        names = names[: len(rows)]
    group_names, repeats = _group_names(rows, config), _repeats(rows, names, config)
    excluded = checks.missing_captions(rows, names, config)
    kept = [i for i in range(len(rows)) if i not in excluded]
    looks = checks.look_at_images(_selected(rows, kept), [names[i] for i in kept], config)
    look_at = dict(zip(kept, looks, strict=True))
    excluded |= {i: look.reason for i, look in look_at.items() if look.reason}
    kept = [i for i in kept if i not in excluded]
    if not kept:
        raise UserError(
            f"Nothing to train on: of {len(rows)} samples {len(excluded)} were left out for "
            "want of a caption or of a readable image."
        )
    buckets = config.buckets
    sample_ids, digests = [names[i] for i in kept], [look_at[i].digest for i in kept]
    return Source(
        dataset=_selected(rows.select_columns([config.image_column, config.caption_column]), kept),
        image_column=config.image_column,
        caption_column=config.caption_column,
        sample_ids=tuple(sample_ids),
        groups=group(sample_ids, [group_names[i] for i in kept], digests),
        excluded=tuple((names[i], excluded[i]) for i in sorted(excluded)),
        digests=tuple(digests),
        sizes=tuple(nearest(look_at[i].size, buckets) for i in kept),
        repeats=tuple(repeats[i] for i in kept),
        spare=any(_spare(look_at[i].size, buckets) for i in kept),
    )


def _selected(rows: Dataset, kept: list[int]) -> Dataset:
    """These rows; without an index of them, which slows reading down, if they are all."""
    return rows if len(kept) == len(rows) else rows.select(kept)


def _spare(size: Size | None, buckets: Sequence[Size]) -> bool:
    """Whether something is left over to crop of an image, or may be."""
    if size is None:
        return True
    target = nearest(size, buckets)
    return cover(size, target) != target


def _sample_ids(rows: Dataset, config: DataConfig) -> list[str]:
    asked = config.sample_id_column
    if asked is None:
        return _own_names(rows) or [f"{position:06d}" for position in range(len(rows))]
    checks.require_column(rows, "sample_id_column", asked, "names", checks.is_name)
    names = checks.cells(rows, asked)
    if fault := checks.fault_of_names(names, asked):
        raise UserError(f"{fault} Fill it, or name another with --sample_id_column.")
    return [str(name) for name in names]


def _own_names(rows: Dataset) -> list[str] | None:
    """What a column ``sample_id`` calls the rows; None if there is none, or it names no samples.

    It may be called so by chance, so it is no mistake then, and the log says why.
    """
    if _SAMPLE_ID not in rows.features:
        return None
    feature, names = rows.features[_SAMPLE_ID], checks.cells(rows, _SAMPLE_ID)
    if checks.is_name(feature):
        fault = checks.fault_of_names(names, _SAMPLE_ID)
    else:
        fault = f"Column {_SAMPLE_ID!r} holds {feature}, not names."
    if fault is None:
        return [str(name) for name in names]
    logger.warning("%s Samples are named by their positions; see --sample_id_column.", fault)
    return None


def _group_names(rows: Dataset, config: DataConfig) -> list[str | None]:
    """What --group_column says of each row, as a text; None where it says nothing."""
    column = config.group_column
    if column is None:
        return [None] * len(rows)
    checks.require_column(rows, "group_column", column, "names", checks.is_name)
    cells = checks.cells(rows, column)
    return [str(cell) if checks.is_filled(cell) else None for cell in cells]


def _repeats(rows: Dataset, names: list[str], config: DataConfig) -> list[int]:
    """How often an epoch visits each row; once where nothing is said."""
    column = config.repeats_column
    if column is None:
        return [1] * len(rows)
    checks.require_column(rows, "repeats_column", column, "whole numbers", checks.is_name)
    repeats = []
    for name, value in zip(names, checks.cells(rows, column), strict=True):
        # As a text, since a folder's metadata are.
        text = str(value) if checks.is_filled(value) else "1"
        if not text.isdecimal() or int(text) < 1:
            raise UserError(
                f"{name}: --repeats_column {column} must hold a whole number of 1 or more; got "
                f"{value!r}."
            )
        repeats.append(int(text))
    return repeats


@dataclass(frozen=True)
class Source:
    """N samples, none of which is known to be bad."""

    dataset: Dataset
    """Their images, not decoded, and captions."""
    image_column: str
    caption_column: str
    sample_ids: tuple[str, ...]
    """(N,) stable and unique."""
    groups: tuple[str, ...]
    """(N,) equal for images that are the same or near it, which belong in one shard."""
    excluded: tuple[tuple[str, str], ...]
    """Name of each sample that the settings let be left out, and why."""
    digests: tuple[str | None, ...]
    """(N,) hashes of the image files, where they were read."""
    sizes: tuple[Size, ...]
    """(N,) height and width that each image is brought to."""
    repeats: tuple[int, ...]
    """(N,) how often an epoch visits each."""
    spare: bool = True
    """Whether any image is larger than what is cropped from it, or may be."""

    def repeated(self, members: Sequence[int]) -> list[int]:
        """The members of a shard, each as often as an epoch visits it."""
        return [index for index in members for _ in range(self.repeats[index])]

    def visits_per_epoch(self, shard_of_N: Tensor, batch_size: int) -> int:
        """Visits of one epoch of all shards; a batch that a size does not fill counts as full."""
        total = 0
        for shard in shard_of_N[shard_of_N >= 0].unique().tolist():
            members = self.repeated((shard_of_N == shard).nonzero().flatten().tolist())
            if len({self.sizes[index] for index in members}) == 1:
                total += len(members)
            else:
                total += batch_size * batches_per_epoch(members, batch_size, self.sizes)
        return total

    def fingerprint(self) -> list[list[Any]]:
        """What tells these samples from any others: name, group, captions, image, repeats."""
        captions = checks.cells(self.dataset, self.caption_column)
        columns = (self.sample_ids, self.groups, captions, self.digests, self.repeats)
        return [list(sample) for sample in zip(*columns, strict=True)]
