"""The training data as one table: images, captions, stable names, and groups of near-duplicates."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Dataset

from iet_sd.config import DataConfig
from iet_sd.data import checks
from iet_sd.data.tables import read_rows
from iet_sd.errors import UserError


def load_source(config: DataConfig) -> "Source":
    """The data that the settings name, checked.

    Names of samples: --sample_id_column, else a column ``sample_id``, else in a folder of images
    their paths, else positions in the data set. Groups: --group_column, else images of equal
    bytes. --max_train_samples takes the first rows, before any is left out.

    Errors: one `UserError` for a mistake, with all the samples it concerns.
    """
    rows = read_rows(config)
    checks.require_column(rows, "image_column", config.image_column, "images", checks.is_image)
    checks.require_column(rows, "caption_column", config.caption_column, "texts", checks.is_text)
    rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
    if config.max_train_samples is not None:
        rows = rows.select(range(min(config.max_train_samples, len(rows))))
    names = _sample_ids(rows, config)
    excluded = checks.missing_captions(rows, names, config)
    kept = [i for i in range(len(rows)) if i not in excluded]
    digests, bad = checks.look_at_images(rows.select(kept), [names[i] for i in kept], config)
    excluded |= {kept[i]: reason for i, reason in bad.items()}
    digest_of = dict(zip(kept, digests, strict=True))
    groups = _groups(rows, names, digest_of, config)
    kept = [i for i in kept if i not in excluded]
    if not kept:
        raise UserError(
            f"Nothing to train on: of {len(rows)} samples {len(excluded)} were left out for "
            "want of a caption or of a readable image."
        )
    return Source(
        dataset=rows.select_columns([config.image_column, config.caption_column]).select(kept),
        image_column=config.image_column,
        caption_column=config.caption_column,
        sample_ids=tuple(names[i] for i in kept),
        groups=tuple(groups[i] for i in kept),
        excluded=tuple((names[i], excluded[i]) for i in sorted(excluded)),
        digests=tuple(digest_of[i] for i in kept),
    )


def _sample_ids(rows: Dataset, config: DataConfig) -> list[str]:
    column = config.sample_id_column or ("sample_id" if "sample_id" in rows.features else None)
    if column is None:
        return [f"{position:06d}" for position in range(len(rows))]
    checks.require_column(rows, "sample_id_column", column, "names", checks.is_name)
    names = [str(value) for value in checks.cells(rows, column) if value not in (None, "")]
    if len(names) < len(rows):
        raise UserError(
            f"Column {column!r} names only {len(names)} of {len(rows)} samples. Fill it, or name "
            "another with --sample_id_column."
        )
    doubles = [name for name, count in Counter(names).items() if count > 1]
    if doubles:
        raise UserError(
            f"Column {column!r} does not tell samples apart: more than one row has "
            f"{checks.listed(doubles)}. Name another with --sample_id_column."
        )
    return names


def _groups(
    rows: Dataset, names: list[str], digests: dict[int, str | None], config: DataConfig
) -> list[str]:
    """The group of every row; a row of which none is known is a group of its own."""
    column = config.group_column
    if column is None:
        known = [digests.get(i) for i in range(len(rows))]
    else:
        checks.require_column(rows, "group_column", column, "names", checks.is_name)
        known = checks.cells(rows, column)
    return [
        f"sample {name}" if group is None else f"group {group}"
        for name, group in zip(names, known, strict=True)
    ]


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
    """(N,) equal for near-duplicates, which belong in one shard."""
    excluded: tuple[tuple[str, str], ...]
    """Name of each sample that the settings let be left out, and why."""
    digests: tuple[str | None, ...]
    """(N,) hashes of the image files, where they were read."""

    def fingerprint(self) -> list[list[Any]]:
        """What tells these samples from any others: name, group, captions and image of each."""
        captions = self.dataset[self.caption_column]
        columns = (self.sample_ids, self.groups, captions, self.digests)
        return [list(sample) for sample in zip(*columns, strict=True)]
