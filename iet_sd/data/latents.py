"""The VAE's posteriors of images, made once: which views of an image there are, and which of them
a visit sees.

A visit draws the same flip and augmentation as it would without a cache, and one of a few crops.
What is kept is mean and standard deviation, so that each visit draws a fresh latent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from iet_sd.config import DataConfig
from iet_sd.data.augmentation import Augmentation, draw_variant, variant
from iet_sd.data.cache import Table
from iet_sd.data.shards import Visit
from iet_sd.data.sources import Source
from iet_sd.data.transforms import Placing, draw_placing
from iet_sd.data.views import view_of
from iet_sd.seeding import seed_for


class Variant(NamedTuple):
    """A view of an image that is kept: the index of the image, and how it is seen."""

    index: int
    placing: Placing
    augmented: tuple[Augmentation, torch.Generator] | None


def crops_drawn(source: Source, config: DataConfig) -> bool:
    """Whether a visit draws a place for its crop: not where images are centred or fit exactly."""
    return source.spare and not config.center_crop


class Variants(Dataset):
    """The views of all images of a source that are kept, in the order of the rows of a table.

    Images of one size lie together, and the views of an image next to each other. With several
    crops each has a place drawn from its image's content, so other runs find the same.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        crops: int | None = None,
        augmentations: Sequence[Augmentation] = (),
    ) -> None:
        """``crops`` of each image, where a crop is drawn at all; each as it is, or augmented in
        each of these ways, in all its variants.
        """
        self.source, self.config, self.augmentations = source, config, augmentations
        self._first_look: dict[Augmentation | None, int] = {} if augmentations else {None: 0}
        self._looks: list[tuple[Augmentation, int] | None] = [] if augmentations else [None]
        for each in augmentations:
            self._first_look[each] = len(self._looks)
            self._looks += [(each, number) for number in range(each.variants)]
        drawn = crops_drawn(source, config)
        self.crops = crops or 1 if drawn else 1
        self.flips = 2 if config.random_flip else 1
        # By content, so that a data set in another order is the same one; equal images share.
        self.first_row: dict[tuple[Any, str], int] = {}
        sizes = [*zip(source.sizes, source.digests, strict=True)]
        self.images = sorted({key: i for i, key in reversed([*enumerate(sizes)])}.items())
        for number, (key, _) in enumerate(self.images):
            self.first_row[key] = number * self.each
        self.groups = [
            sum(size == key[0] for key, _ in self.images) * self.each
            for size in sorted(set(source.sizes))
        ]

    def __len__(self) -> int:
        return len(self.images) * self.each

    @property
    def each(self) -> int:
        """Rows of an image."""
        return self.crops * self.flips * len(self._looks)

    def row_of(self, visit: Visit, augmentation: Augmentation | None = None) -> int:
        """The row that the visit sees. Errors: `KeyError` for a way of augmenting not kept."""
        generator = visit.generator("view")
        drawn, look = draw_placing(generator), self._first_look[augmentation]
        if augmentation is not None:
            look += draw_variant(augmentation, generator)
        first = self.first_row[self.source.sizes[visit.index], self.source.digests[visit.index]]
        placed = int(drawn.across * self.crops) * self.flips + (self.flips > 1 and drawn.flip)
        return first + placed * len(self._looks) + look

    def size_of(self, row: int) -> tuple[int, int]:
        """Height and width of the pixels of a row."""
        (size, _), _ = self.images[row // self.each]
        return size

    def describe(self) -> list[Any]:
        """All that the rows depend on besides the VAE, as JSON."""
        config = self.config
        how = [config.center_crop, config.image_interpolation_mode, self.crops, self.flips]
        return [how, [key for key, _ in self.images], *self.augmentations]

    def variant(self, row: int) -> Variant:
        """What the row holds."""
        number, view = divmod(row, self.each)
        (_, digest), index = self.images[number]
        placed, look = divmod(view, len(self._looks))
        crop, flip = divmod(placed, self.flips)
        generator = torch.Generator().manual_seed(seed_for(0, "crop", digest, crop))
        placing = draw_placing(generator)._replace(flip=bool(flip))
        if (kept := self._looks[look]) is None:
            return Variant(index, placing, None)
        augmentation, number = kept
        return Variant(index, placing, (augmentation, variant(augmentation, digest, number)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The pixels of a row, and what SDXL is told of them. Errors: as `decode`."""
        return view_of(self.source, self.config, *self.variant(row))._asdict()


@dataclass(eq=False)
class Latents:
    """The kept posteriors: ``latent_mean`` and ``latent_std`` (C, h, w), and SDXL's sizes."""

    variants: Variants
    table: Table

    def __call__(self, visit: Visit, augmentation: Augmentation | None = None) -> dict[str, Tensor]:
        """What the visit sees. Errors: as `Table`, and `Variants.row_of`."""
        return dict(self.table[self.variants.row_of(visit, augmentation)])


@dataclass(eq=False)
class Texts:
    """The kept embeddings of captions: what the UNet is told, by name, in place of tokens."""

    captions: Sequence[str]
    """Sorted, each once: the rows of the table."""
    table: Table

    def __post_init__(self) -> None:
        self._row = {caption: row for row, caption in enumerate(self.captions)}

    def __call__(self, caption: str) -> dict[str, Tensor]:
        """Of a caption as a visit reads it. Errors: as `Table`."""
        return dict(self.table[self._row[caption]])


def pieces(rows: range, size: int) -> Iterator[range]:
    """The rows, in pieces of at most ``size``."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
