"""The held-out images: where they are, and that none of them was trained on."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from iet_sd.config import DataConfig
from iet_sd.data.checks import listed
from iet_sd.data.sources import Source, load_source
from iet_sd.data.tables import require_split
from iet_sd.errors import UserError
from iet_sd.evaluation.images import TableImages

# Fewer images than this are compared before a progress bar could be read.
_BAR_FROM = 1000


def heldout_of(data: DataConfig) -> DataConfig:
    """Where the held-out images are, read as the training images are.

    A place of their own holds a single split, of any name: that of the training images says
    nothing of it.
    """
    changes: dict[str, Any] = dict.fromkeys(
        ("heldout_split", "heldout_data_dir", "max_train_samples", "repeats_column")
    )
    if data.heldout_split:
        changes["dataset_split"] = data.heldout_split
    else:
        place = {"dataset_name": None, "train_data_dir": data.heldout_data_dir}
        changes |= {**place, "dataset_split": None}
    return replace(data, **changes)


def load_heldout(data: DataConfig, train: Source) -> Source:
    """The held-out images that the settings name, none of which is in ``train``.

    Errors: as `load_source`, by the flags of held-out images, and as `check_disjoint`.
    """
    with _own_flags(data):
        heldout = load_source(heldout_of(data))
    tables = (
        TableImages(source, data.resolution, data.image_interpolation_mode)
        for source in (train, heldout)
    )
    check_disjoint(*tables)
    return heldout


def require_heldout_split(data: DataConfig) -> None:
    """Errors: `UserError` if there is no --heldout_split in the data set. No image is read."""
    with _own_flags(data):
        require_split(heldout_of(data))


@contextmanager
def _own_flags(data: DataConfig) -> Iterator[None]:
    """Errors name the flags of held-out images, not those of training images."""
    flag = "dataset_split" if data.heldout_split else "train_data_dir"
    own_flag = "heldout_split" if data.heldout_split else "heldout_data_dir"
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"--{flag} ", f"--{own_flag} ")) from error


def require_images(who: str, train: Source, heldout: Source | None = None) -> None:
    """Errors: `UserError` for fewer than two images of a kind that vary on their own.

    ``who`` needs them: the text begins with it.
    """
    units = {"training images": train.sample_ids}
    if heldout is not None:
        units["held-out images that are not near-duplicates of each other"] = heldout.groups
    for what, names in units.items():
        if (count := len(set(names))) < 2:
            raise UserError(f"{who} compares images, so it needs at least 2 {what}; got {count}.")


def check_disjoint(train: TableImages, heldout: TableImages) -> None:
    """No held-out image may be a training image: by its file's bytes, or by its pixels.

    Pixels are compared as training sees them, not mirrored, so an image that was saved anew without
    loss is found. Near-duplicates are not looked for: they belong to what is measured.
    Errors: `UserError` that counts them and names some.
    """
    for contents in (lambda images: images.digests, _pixels):
        known = dict(zip(contents(train), train.ids, strict=True))
        both = [
            f"{name} (training image {known[content]})"
            for content, name in zip(contents(heldout), heldout.ids, strict=True)
            if content in known
        ]
        if both:
            raise UserError(
                f"{len(both)} of {len(heldout)} held-out images are training images too: "
                f"{listed(both)}. A copy of them would count as new, so nothing measured would "
                "tell of memorization. Take them out of the held-out images, or give others by "
                "--heldout_split or --heldout_data_dir."
            )


def _pixels(images: TableImages) -> list[str]:
    """A hash of each image, decoded."""

    def digest(index: int) -> str:
        return hashlib.sha256(images[index].tobytes()).hexdigest()

    with ThreadPoolExecutor() as pool:
        found: Iterable[str] = pool.map(digest, range(len(images)))
        return list(
            tqdm(
                found,
                desc="Comparing images",
                total=len(images),
                disable=len(images) < _BAR_FROM,
                leave=False,
            )
        )
