"""From a picture to what the VAE sees: resize, augment, crop, flip, normalise.

Letters in shapes: H height, W width. Sizes and places are (height, width) and (top, left).
"""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from iet_sd.data.augmentation import Augmentation, augment
from iet_sd.devices import on_device

CPU = torch.device("cpu")


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


CENTRE = Placing(0.5, 0.5, flip=False)


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
    placing: Placing = CENTRE,
    augmented: tuple[Augmentation, torch.Generator] | None = None,
    device: torch.device = CPU,
) -> View:
    """``image`` as one visit sees it: resized to cover ``size`` (H, W), augmented, cropped to it.

    ``augmented``: how, and a generator for what is random about it. From there on it is on
    ``device``.
    """
    original_size = image.height, image.width
    resized = F.resize(
        image, list(cover(original_size, size)), InterpolationMode[interpolation.upper()]
    )
    # A quarter of the bytes of what the VAE sees.
    picture = on_device(F.pil_to_tensor(resized), device)
    if augmented:
        picture = augment(picture, *augmented)
    height, width = size
    spare = resized.height - height, resized.width - width
    if center_crop:
        top, left = (round(pixels / 2) for pixels in spare)
    else:
        shares = placing.down, placing.across
        top, left = (int(share * (pixels + 1)) for share, pixels in zip(shares, spare, strict=True))
    picture = F.crop(picture, top, left, height, width)
    if random_flip and placing.flip:
        picture = F.hflip(picture)
        left = spare[1] - left
    return View((picture.float() / 255 - 0.5) / 0.5, original_size, (top, left))


def cover(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same shape, cut to whole pixels, that ``size`` fits into."""
    (h, w), (height, width) = original, size
    if h * width <= w * height:
        return height, int(height * w / h)
    return int(width * h / w), width
