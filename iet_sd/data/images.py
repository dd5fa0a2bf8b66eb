"""Any image file as an 8-bit RGB picture, upright and on white."""

import hashlib
import io
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import fsspec
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from iet_sd.errors import UserError

_GREY_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# EXIF orientations that exchange width and height.
_TURNED = (5, 6, 7, 8)


def decode(record: dict[str, Any] | None, name: str, digest: str | None = None) -> Image.Image:
    """The picture of ``record``, in mode RGB: rotated by its EXIF tag, alpha laid over white.

    Of an animation the first frame. Grey values of 16 bit are scaled to 8, not cut off. Values of
    float images are read as 0 to 1 if none exceeds 1, otherwise as 0 to 255.

    record: ``{"bytes": ..., "path": ...}`` of `datasets.Image(decode=False)`; None for no image.
    name: what to call the image in an error.
    digest: what `digest_of` its file was before, if that is known; a row that holds the bytes of an
    image itself is not compared.
    Errors: `UserError` ``"name: reason"`` for what cannot be read, or has changed.
    """
    try:
        content = read_bytes(record)
        if digest and record.get("bytes") is None and digest_of(content) != digest:
            raise ValueError("not the file that it was before")
        with Image.open(io.BytesIO(content)) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's many readers raise anything on a broken file
        raise UserError(f"{name}: {_reason(error)}") from error


def size_of(record: dict[str, Any] | None, name: str) -> tuple[int, int]:
    """Height and width of what `decode` gives, from the file's header alone.

    Errors: `UserError` ``"name: reason"`` for what cannot be read.
    """
    try:
        with _open(record) as file, Image.open(file) as image:
            # Of the base class: some formats would decode the image to look for a tag at its end.
            turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _TURNED
            return image.size if turned else image.size[::-1]
    except Exception as error:  # as in decode
        raise UserError(f"{name}: {_reason(error)}") from error


def read_bytes(record: dict[str, Any] | None) -> bytes:
    """The encoded file of ``record``. Errors: `OSError`, or `ValueError` for an empty record."""
    with _open(record) as file:
        return file.read()


def _open(record: dict[str, Any] | None) -> AbstractContextManager[BinaryIO]:
    content, path = (record or {}).get("bytes"), (record or {}).get("path")
    if content is None and path is None:
        raise ValueError("the row holds no image")
    # A path may lead into an archive: zip://cat.png::/data/cats.zip
    return fsspec.open(path, "rb") if content is None else io.BytesIO(content)


def digest_of(content: bytes) -> str:
    """A hash of an image file: 1 ms per MB, a hundredth (JPEG) to a tenth (PNG) of decoding."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _GREY_16_BIT:
        image = _from_values(np.asarray(image, dtype=np.float64), whole=65535)
    elif image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = _from_values(values, whole=1 if values.max() <= 1 else 255)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_values(values: np.ndarray, whole: int) -> Image.Image:
    """Grey picture of numbers from 0 (black) to ``whole`` (white)."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= whole):  # so that NaN fails as well
        raise ValueError(f"grey values from {low:g} to {high:g}; expected 0 to {whole}")
    return Image.fromarray(np.rint(values * (255 / whole)).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
