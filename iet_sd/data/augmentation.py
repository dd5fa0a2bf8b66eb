"""Augmentation of a picture by a few random operations, of a strength on RandAugment's scale.

Cubuk et al. 2020 (arXiv 1909.13719). Sizes are (width, height), as in PIL.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from iet_sd.errors import UserError
from iet_sd.seeding import seed_for

# RandAugment's scale of magnitudes: 0, 1, ..., 30.
BINS = 31

Function = Callable[[Image.Image, float], Image.Image]
Operations = Mapping[str, tuple[Function, bool]]
"""Name: what it does to an image at a level, and whether the level has a sign."""


class Augmentation(NamedTuple):
    """How one picture is augmented."""

    magnitude: float
    """0 to 30."""
    num_ops: int = 2
    """Operations in a row."""
    operations: Literal["randaugment", "gentle"] = "randaugment"
    """Which, of `OPERATIONS`."""
    variants: int = 0
    """How many there are of each picture; 0: one for each visit."""


def draw_variant(augmentation: Augmentation, generator: torch.Generator) -> int:
    """Which of its variants a visit sees."""
    return int(torch.randint(augmentation.variants, (), generator=generator))


def variant(augmentation: Augmentation, picture: str, number: int) -> torch.Generator:
    """The generator of one variant of the augmented ``picture``, which is named by its content."""
    address = picture, f"{augmentation.magnitude:g}", str(number)
    return torch.Generator().manual_seed(seed_for(0, "augmentation", *address))


def augment(
    image: Image.Image, augmentation: Augmentation, generator: torch.Generator
) -> Image.Image:
    """Operations that are drawn from ``generator``, one after another, at one magnitude.

    image: mode RGB. Errors: `UserError` for a magnitude off the scale.
    """
    if not 0 <= augmentation.magnitude <= BINS - 1:
        raise UserError(
            f"--taa_magnitude must lie in 0 to {BINS - 1}; got {augmentation.magnitude:g}."
        )
    names = list(OPERATIONS[augmentation.operations])
    for _ in range(augmentation.num_ops):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        negative = bool(torch.randint(2, (), generator=generator))
        image = apply(image, name, augmentation, negative)
    return image


def apply(image: Image.Image, name: str, augmentation: Augmentation, negative: bool) -> Image.Image:
    """One operation; ``negative`` turns the direction of those that have two."""
    function, signed = OPERATIONS[augmentation.operations][name]
    level = _level(name, augmentation.magnitude, image.size)
    return function(image, -level if signed and negative else level)


def _level(name: str, magnitude: float, size: tuple[int, int]) -> float:
    """What ``magnitude`` means for an operation, linear between the bins of torchvision's scale."""
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
    if name not in ends:
        return 0.0
    bins = torch.linspace(*ends[name], BINS).tolist()
    low = int(magnitude)
    between = magnitude - low
    return bins[low] + between * (bins[low + 1] - bins[low]) if between else bins[low]


def _affine(
    image: Image.Image,
    translate: tuple[float, float] = (0, 0),
    shear: tuple[float, float] = (0, 0),
    center: tuple[int, int] | None = None,
    interpolation: InterpolationMode = InterpolationMode.NEAREST,
) -> Image.Image:
    """Whole pixels of translation, and shear as the share by which a row or column moves."""
    return F.affine(
        image,
        angle=0.0,
        translate=[int(pixels) for pixels in translate],
        scale=1.0,
        shear=[math.degrees(math.atan(share)) for share in shear],
        interpolation=interpolation,
        center=center and list(center),
    )


def _mirrored(function: Function, reach: Callable[[float, float], float]) -> Function:
    """``function`` of a picture that goes on beyond its edges as its mirror image.

    ``reach``: how many pixels beyond an edge it looks at a level above 0, by half of the longer
    side.
    """

    def wider(image: Image.Image, level: float) -> Image.Image:
        width, height = image.size
        # And the neighbours of a pixel, between which it is interpolated.
        margin = math.ceil(reach(abs(level), max(width, height) / 2)) + 2
        padded = F.pad(image, margin, padding_mode="reflect")
        return F.center_crop(function(padded, level), [height, width])

    return wider


def _shear(image: Image.Image, across: float, down: float) -> Image.Image:
    return _affine(image, shear=(across, down), interpolation=InterpolationMode.BILINEAR)


def _turn(image: Image.Image, degrees: float) -> Image.Image:
    return F.rotate(image, degrees, InterpolationMode.BILINEAR)


def _sheared(share: float, half: float) -> float:
    return share * half


def _shifted(pixels: float, _: float) -> float:
    return pixels


def _turned(degrees: float, half: float) -> float:
    return math.sin(math.radians(degrees)) * half


_RANDAUGMENT: Operations = {
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
_GENTLE: Operations = {
    "Identity": _RANDAUGMENT["Identity"],
    "ShearX": (_mirrored(lambda image, level: _shear(image, level, 0), _sheared), True),
    "ShearY": (_mirrored(lambda image, level: _shear(image, 0, level), _sheared), True),
    "TranslateX": (_mirrored(lambda i, level: _affine(i, (round(level), 0)), _shifted), True),
    "TranslateY": (_mirrored(lambda i, level: _affine(i, (0, round(level))), _shifted), True),
    "Rotate": (_mirrored(_turn, _turned), True),
    "Color": _RANDAUGMENT["Color"],
    "Sharpness": _RANDAUGMENT["Sharpness"],
}
OPERATIONS: Mapping[str, Operations] = {"randaugment": _RANDAUGMENT, "gentle": _GENTLE}
"""``randaugment``: operations and scales of torchvision's, but for magnitudes between its bins.
What a geometric operation uncovers becomes black, and some operations act at magnitude 0 too:
AutoContrast and Equalize have no scale, and Solarize turns pure white black. A model learns to draw
such marks. ``gentle``: those that do nothing at magnitude 0 and leave a blank page blank; what they
uncover is the picture's mirror image, and pixels are interpolated."""
