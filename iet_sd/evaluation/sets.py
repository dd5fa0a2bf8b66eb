"""The sets of images that are compared, and their features by every embedder."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from iet_sd.evaluation.embedders import Embedder
from iet_sd.evaluation.features import embed
from iet_sd.evaluation.images import ImageSet


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    index: int = 0
    count: int = 1
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Images:
    """The generations, the training images, and held-out images if there are any."""

    generated: ImageSet
    train: ImageSet
    heldout: ImageSet | None

    def present(self) -> dict[str, ImageSet]:
        """The sets that there are, by name."""
        sets = {"generated": self.generated, "train": self.train, "heldout": self.heldout}
        return {name: images for name, images in sets.items() if images is not None}


class Subset:
    """Some images of a set, as an `ImageSet`."""

    def __init__(self, images: ImageSet, index: Sequence[int]) -> None:
        self.images = images
        self.index = [int(i) for i in index]
        self.ids = [images.ids[i] for i in self.index]
        self.fingerprint = f"{self.index} of {images.fingerprint}"

    def __len__(self) -> int:
        """How many they are."""
        return len(self.index)

    def __getitem__(self, position: int) -> Image.Image:
        """One of them."""
        return self.images[self.index[position]]


View = tuple[str, bool]
"""A set, by its name, and whether it is mirrored."""


class Features:
    """What one embedder says of sets of images, as they are and mirrored."""

    def __init__(
        self,
        embedder: Embedder,
        images: Images,
        cache_dir: Path,
        batch_size: int,
        process: Process,
        views: Collection[View],
    ) -> None:
        """Compute of ``views`` what is not in ``cache_dir``, of the sets that there are.

        All processes take part, and see the same.

        Errors: as `embed`.
        """
        self.embedder = embedder
        self._features = {
            (name, flip): embed(
                embedder,
                image_set,
                cache_dir,
                flip=flip,
                batch_size=batch_size,
                process_index=process.index,
                num_processes=process.count,
                barrier=process.barrier,
                progress=f"{embedder.name}, {name}{', mirrored' if flip else ''}",
            )
            for name, image_set in images.present().items()
            for flip in (False, True)
            if (name, flip) in views
        }

    def __contains__(self, name: str) -> bool:
        """Whether there is a set of this name."""
        return (name, False) in self._features

    def __getitem__(self, name: str) -> np.ndarray:
        """Of a set, as it is: float32 (N, D), mapped."""
        return self._features[name, False]

    def mirrored(self, name: str) -> np.ndarray:
        """Of a set, left and right exchanged: float32 (N, D), mapped."""
        return self._features[name, True]
