"""Checks of the training data before a run: columns, captions, images."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from tqdm.auto import tqdm

from iet_sd.config import DataConfig
from iet_sd.data.captions import texts
from iet_sd.data.images import decode, digest_of, read_bytes, size_of
from iet_sd.errors import UserError

_TEXT_TYPES = ("string", "large_string", "string_view")
_BATCH = 256
# Fewer images than this are checked before a progress bar could be read.
_BAR_FROM = 1000
# Samples an error lists by name.
_LISTED = 5


def cells(rows: Dataset, column: str) -> list[Any]:
    """All values of a column."""
    return rows.select_columns([column])[:][column]


def is_filled(cell: Any) -> bool:
    """Whether a cell holds something: neither null nor NaN, nor blanks alone.

    Readers differ in what they make of a cell that was left empty: csv gives "", pandas NaN.
    """
    return cell is not None and cell == cell and str(cell).strip() != ""


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def require_column(
    rows: Dataset, flag: str, column: str, kind: str, fits: Callable[[Any], bool]
) -> None:
    """Asks for a column whose type ``fits``, and suggests those that do.

    Errors: `UserError` if the column is not there, or not of that ``kind``.
    """
    found = rows.features
    if column in found and fits(found[column]):
        return
    what = f"holds {found[column]}, not {kind}" if column in found else "does not exist"
    able = [name for name in found if fits(found[name])]
    advice = f"for example --{flag} {able[0]}" if able else f"but none holds {kind}"
    raise UserError(
        f"--{flag}: column {column!r} {what}. Columns found: {', '.join(found)}; {advice}."
    )


def is_text(feature: Any) -> bool:
    """Whether a column is of texts or lists of texts, by its type."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in _TEXT_TYPES


def is_name(feature: Any) -> bool:
    """Whether a column is of single texts or whole numbers, by its type."""
    return isinstance(feature, datasets.Value | datasets.ClassLabel) and (
        feature.dtype in _TEXT_TYPES or "int" in feature.dtype
    )


def fault_of_names(values: list[Any], column: str) -> str | None:
    """Why values do not name samples: each must have one, and no two the same. Else None."""
    names = [str(value) for value in values if is_filled(value)]
    if len(names) < len(values):
        return f"Column {column!r} names only {len(names)} of {len(values)} samples."
    if len(set(names)) < len(names):
        doubles = [name for name, count in Counter(names).items() if count > 1]
        return (
            f"Column {column!r} does not tell samples apart: more than one row has "
            f"{listed(doubles)}."
        )
    return None


def is_image(feature: Any) -> bool:
    """Whether a column is of images or of encoded files, by its type."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary")
    return isinstance(feature, datasets.Image)


def missing_captions(rows: Dataset, names: list[str], config: DataConfig) -> dict[int, str]:
    """Positions of the rows to leave out since they have no caption, with the reason.

    Errors: `UserError` if the settings do not allow for any.
    """
    values = cells(rows, config.caption_column)
    missing = [i for i, value in enumerate(values) if not texts(value, names[i])]
    if config.on_missing_caption == "empty":
        return {}
    if config.on_missing_caption == "skip" or not missing:
        return dict.fromkeys(missing, "no caption")
    raise UserError(
        f"{len(missing)} of {len(rows)} images have no caption: "
        f"{listed([names[i] for i in missing])}. Caption them, or use --on_missing_caption skip "
        "to leave them out, or --on_missing_caption empty to train them with an empty one."
    )


class Look(NamedTuple):
    """What is known of an image before it is trained on."""

    digest: str | None = None
    """Hash of its file."""
    size: tuple[int, int] | None = None
    """Height and width, upright."""
    reason: str | None = None
    """Why it cannot be read."""


def look_at_images(rows: Dataset, names: list[str], config: DataConfig) -> list[Look]:
    """Every image decoded, or only its size read, or nothing of it, as the settings need.

    Errors: `UserError` for bad images, all in one, if the settings do not allow for them.
    """
    if config.check_images == "none" and len(config.buckets) == 1:
        return [Look()] * len(rows)
    look = _decode if config.check_images == "all" else _measure
    looks: list[Look] = []
    remaining = iter(names)
    bar = tqdm(total=len(rows), desc="Checking images", disable=len(rows) < _BAR_FROM, leave=False)
    with bar, ThreadPoolExecutor() as pool:
        # Batch by batch, since a pool takes in all of its input at once.
        for batch in rows.select_columns([config.image_column]).iter(_BATCH):
            records = batch[config.image_column]
            looks += pool.map(look, records, remaining)
            bar.update(len(records))
    bad = {name: look.reason for name, look in zip(names, looks, strict=True) if look.reason}
    if bad and config.on_bad_image == "error":
        _raise_bad(bad, len(names))
    return looks


def _decode(record: dict[str, Any] | None, name: str) -> Look:
    try:
        picture = decode(record, name)
        return Look(digest_of(read_bytes(record)), (picture.height, picture.width))
    except UserError as error:
        return Look(reason=str(error).removeprefix(f"{name}: "))


def _measure(record: dict[str, Any] | None, name: str) -> Look:
    try:
        return Look(size=size_of(record, name))
    except UserError as error:
        return Look(reason=str(error).removeprefix(f"{name}: "))


def _raise_bad(bad: dict[str, str], number: int) -> None:
    lines = [f"  {name}: {reason}" for name, reason in list(bad.items())[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  and {len(bad) - _LISTED} more")
    raise UserError(
        f"{len(bad)} of {number} images cannot be read:\n"
        + "\n".join(lines)
        + "\nRepair or remove them, or use --on_bad_image skip to leave them out."
    )
