"""Sets of images to be compared, with names for people and a fingerprint for caches."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torchvision.transforms import functional as F

from iet_sd.data.folder import IMAGE_SUFFIXES, is_image, walk
from iet_sd.data.images import decode, digest_of, read_bytes
from iet_sd.data.sources import Source
from iet_sd.data.transforms import view
from iet_sd.errors import UserError


class ImageSet(Protocol):
    """Images with stable names."""

    @property
    def ids(self) -> Sequence[str]:
        """A name for each, unique."""

    @property
    def fingerprint(self) -> str:
        """Changes when an image or their order does.

        It is made of the encoded files, so that no image is decoded for it: an image that was
        saved anew counts as changed, even if its pixels are the same.
        """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...  # mode RGB


class FolderImages:
    """The images in a folder and its subfolders as they are, sorted by path.

    Errors: `UserError` if there are none, and for each image that cannot be read, when it is met.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        self.paths = [path for path in walk(self.folder) if is_image(path)]
        if not self.paths:
            what = "holds no images" if self.folder.is_dir() else "is no folder"
            raise UserError(
                f"{self.folder} {what}. Expected files like {', '.join(IMAGE_SUFFIXES)}."
            )
        self.ids = tuple(path.as_posix() for path in self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when an image (its file) or their order does."""
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_digest, map(self._record, range(len(self))), self.ids))
        return _hashed(digests)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return decode(self._record(index), self.ids[index])

    def _record(self, index: int) -> dict[str, Any]:
        return {"bytes": None, "path": str(self.folder / self.paths[index])}


class TableImages:
    """The images of a training or held-out ``source`` as training sees them, less its chance.

    Resized (shorter edge, by ``interpolation``) and cropped in the centre to ``resolution``, not
    flipped.
    Errors: `UserError` for each image that cannot be read or has changed, when it is met.
    """

    def __init__(self, source: Source, resolution: int, interpolation: str) -> None:
        self.source = source
        self.resolution = resolution
        self.interpolation = interpolation
        self.ids = source.sample_ids

    @cached_property
    def fingerprint(self) -> str:
        """Changes when an image (its file), their order, or the resize does."""
        return _hashed([*self.digests, self.resolution, self.interpolation])

    @cached_property
    def digests(self) -> list[str]:
        """`digest_of` each encoded file; those that the source does not know are read."""
        return [
            digest or _digest(self._record(index), self.ids[index])
            for index, digest in enumerate(self.source.digests)
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Image.Image:
        pixels = view(
            decode(self._record(index), self.ids[index], self.source.digests[index]),
            size=(self.resolution, self.resolution),
            center_crop=True,
            random_flip=False,
            interpolation=self.interpolation,
        ).pixel_values
        # From [-1, 1] back to the very bytes that it came from.
        return F.to_pil_image((pixels * 127.5 + 127.5).round().to(torch.uint8))

    def _record(self, index: int) -> dict[str, Any]:
        return self.source.dataset[index][self.source.image_column]


def _digest(record: dict[str, Any] | None, name: str) -> str:
    """`digest_of` an encoded file, as `Source.digests` holds it."""
    try:
        return digest_of(read_bytes(record))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error


def _hashed(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
