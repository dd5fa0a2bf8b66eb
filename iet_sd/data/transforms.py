"""From a picture to what the VAE sees: resize, augment, crop, flip, normalise.

Letters in shapes: H height, W width. Sizes and places are (height, width) and (top, left).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from iet_sd.errors import UserError

# RandAugment's scale of magnitudes: 0, 1, ..., 30.
BINS = 31


class View(NamedTuple):
    """A picture as one visit sees it, and what SDXL is told of it besides (Podell et al. 2023)."""

    pixel_values: Tensor
    """float32 (3, H, W), in [-1, 1]."""
    original_size: tuple[int, int]
    """Size of the picture before it was resized."""
    crop_top_left: tuple[int, int]
    """Where the crop begins in the resized picture; in its mirror image, if it was flipped."""


class Placing(NamedTuple):
    """Where a crop lies, as shares of what there is to choose from, and whether it is mirrored."""

    across: float
    down: float
    flip: bool


def draw_placing(generator: torch.Generator) -> Placing:
    """Place and flip of one visit; all are drawn, whether used or not."""
    across, down, flip = torch.rand(3, dtype=torch.float64, generator=generator).tolist()
    return Placing(across, down, flip < 0.5)


def view(
    image: Image.Image,
    *,
    size: tuple[int, int],
    center_crop: bool,
    random_flip: bool,
    interpolation: str,
    generator: torch.Generator,
    magnitude: float | None = None,
    num_ops: int = 2,
) -> View:
    """``image`` as one visit sees it: resized to cover ``size`` (H, W), and cropped to it.

    Place of the crop and flip are drawn first, so that one seed gives the same crop and flip with
    (``magnitude`` given) and without augmentation.
    """
    placing = draw_placing(generator)
    augment = None
    if magnitude is not None:
        augment = partial(rand_augment, num_ops=num_ops, magnitude=magnitude, generator=generator)
    return place(
        image,
        size=size,
        center_crop=center_crop,
        random_flip=random_flip,
        interpolation=interpolation,
        placing=placing,
        augment=augment,
    )


def place(
    image: Image.Image,
    *,
    size: tuple[int, int],
    center_crop: bool,
    random_flip: bool,
    interpolation: str,
    placing: Placing,
    augment: Callable[[Image.Image], Image.Image] | None = None,
) -> View:
    """`view` with a crop and flip that are known; ``augment`` acts on the resized image."""
    original_size = image.height, image.width
    image = F.resize(
        image, list(cover(original_size, size)), InterpolationMode[interpolation.upper()]
    )
    if augment is not None:
        image = augment(image)
    height, width = size
    spare = image.height - height, image.width - width
    if center_crop:
        top, left = (round(pixels / 2) for pixels in spare)
    else:
        shares = placing.down, placing.across
        top, left = (int(share * (pixels + 1)) for share, pixels in zip(shares, spare, strict=True))
    image = F.crop(image, top, left, height, width)
    if random_flip and placing.flip:
        image = F.hflip(image)
        left = spare[1] - left
    return View(F.normalize(F.to_tensor(image), [0.5], [0.5]), original_size, (top, left))


def cover(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same shape, cut to whole pixels, that ``size`` fits into."""
    (h, w), (height, width) = original, size
    if h * width <= w * height:
        return height, int(height * w / h)
    return int(width * h / w), width


def rand_augment(
    image: Image.Image, num_ops: int, magnitude: float, generator: torch.Generator
) -> Image.Image:
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719): ``num_ops`` random operations in a row.

    Operations and their scales are torchvision's, but the magnitude may lie between two of its
    bins, and every draw comes from ``generator``. As in torchvision, what a geometric operation
    uncovers becomes black, and some operations act at magnitude 0 too: AutoContrast and Equalize
    have no scale, and Solarize turns pure white black.

    image: mode RGB. magnitude: 0 to 30.
    Errors: `UserError` for a magnitude off the scale.
    """
    if not 0 <= magnitude <= BINS - 1:
        raise UserError(f"--taa_magnitude must lie in 0 to {BINS - 1}; got {magnitude:g}.")
    for _ in range(num_ops):
        op = int(torch.randint(len(OPS), (), generator=generator))
        negative = bool(torch.randint(2, (), generator=generator))
        image = apply_op(image, list(OPS)[op], magnitude, negative)
    return image


def apply_op(image: Image.Image, op: str, magnitude: float, negative: bool) -> Image.Image:
    """One operation of RandAugment; ``negative`` turns the direction of those that have two."""
    function, signed = OPS[op]
    level = _level(op, magnitude, image.size)
    return function(image, -level if signed and negative else level)


def _level(op: str, magnitude: float, size: tuple[int, int]) -> float:
    """What ``magnitude`` means for ``op``, linear between the bins of torchvision's scale."""
    # The ends of torchvision's scales; bins in float32 as there, so whole magnitudes agree exactly.
    ends = {
        "ShearX": (0.0, 0.3),
        "ShearY": (0.0, 0.3),
        "TranslateX": (0.0, 150.0 / 331.0 * size[0]),
        "TranslateY": (0.0, 150.0 / 331.0 * size[1]),
        "Rotate": (0.0, 30.0),
        "Brightness": (0.0, 0.9),
        "Color": (0.0, 0.9),
        "Contrast": (0.0, 0.9),
        "Sharpness": (0.0, 0.9),
        "Posterize": (8.0, 4.0),
        "Solarize": (255.0, 0.0),
    }
    if op not in ends:
        return 0.0
    bins = torch.linspace(*ends[op], BINS).tolist()
    low = int(magnitude)
    between = magnitude - low
    return bins[low] + between * (bins[low + 1] - bins[low]) if between else bins[low]


def _affine(
    image: Image.Image,
    translate: tuple[float, float] = (0, 0),
    shear: tuple[float, float] = (0, 0),
    center: tuple[int, int] | None = None,
) -> Image.Image:
    """Whole pixels of translation, and shear as the share by which a row or column moves."""
    return F.affine(
        image,
        angle=0.0,
        translate=[int(pixels) for pixels in translate],
        scale=1.0,
        shear=[math.degrees(math.atan(share)) for share in shear],
        center=center and list(center),
    )


# Name: what it does to an image at a level, and whether the level has a sign.
OPS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], bool]] = {
    "Identity": (lambda image, _: image, False),
    "ShearX": (lambda image, level: _affine(image, shear=(level, 0), center=(0, 0)), True),
    "ShearY": (lambda image, level: _affine(image, shear=(0, level), center=(0, 0)), True),
    "TranslateX": (lambda image, level: _affine(image, translate=(level, 0)), True),
    "TranslateY": (lambda image, level: _affine(image, translate=(0, level)), True),
    "Rotate": (lambda image, level: F.rotate(image, level), True),
    "Brightness": (lambda image, level: F.adjust_brightness(image, 1 + level), True),
    "Color": (lambda image, level: F.adjust_saturation(image, 1 + level), True),
    "Contrast": (lambda image, level: F.adjust_contrast(image, 1 + level), True),
    "Sharpness": (lambda image, level: F.adjust_sharpness(image, 1 + level), True),
    "Posterize": (lambda image, level: F.posterize(image, round(level)), False),
    "Solarize": (lambda image, level: F.solarize(image, level), False),
    "AutoContrast": (lambda image, _: F.autocontrast(image), False),
    "Equalize": (lambda image, _: F.equalize(image), False),
}
