"""Augmentation of a picture by a few random operations, of a strength on RandAugment's scale.

Cubuk et al. 2020 (arXiv 1909.13719). A picture is a uint8 tensor (3, H, W) on any device, and what
is made of it lies there too. ``gentle`` operations never wait for the device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms import functional as F

from iet_sd.errors import UserError
from iet_sd.seeding import seed_for

# RandAugment's scale of magnitudes: 0, 1, ..., 30.
BINS = 31

Function = Callable[[Tensor, float], Tensor]
Operations = Mapping[str, tuple[Function, bool]]
"""Name: what it does to a picture at a level, and whether the level has a sign."""


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


def augment(picture: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Operations that are drawn from ``generator``, one after another, at one magnitude.

    Errors: `UserError` for a magnitude off the scale.
    """
    if not 0 <= augmentation.magnitude <= BINS - 1:
        raise UserError(
            f"--taa_magnitude must lie in 0 to {BINS - 1}; got {augmentation.magnitude:g}."
        )
    names = list(OPERATIONS[augmentation.operations])
    for _ in range(augmentation.num_ops):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        negative = bool(torch.randint(2, (), generator=generator))
        picture = apply(picture, name, augmentation, negative)
    return picture


def apply(picture: Tensor, name: str, augmentation: Augmentation, negative: bool) -> Tensor:
    """One operation; ``negative`` turns the direction of those that have two."""
    function, signed = OPERATIONS[augmentation.operations][name]
    level = _level(name, augmentation.magnitude, picture.shape[-2:])
    return function(picture, -level if signed and negative else level)


def _level(name: str, magnitude: float, size: Sequence[int]) -> float:
    """What ``magnitude`` means for an operation, linear between the bins of torchvision's scale."""
    # The ends of torchvision's scales; bins in float32 as there, so whole magnitudes agree exactly.
    ends = {
        "ShearX": (0.0, 0.3),
        "ShearY": (0.0, 0.3),
        "TranslateX": (0.0, 150.0 / 331.0 * size[1]),
        "TranslateY": (0.0, 150.0 / 331.0 * size[0]),
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
    picture: Tensor,
    translate: tuple[float, float] = (0, 0),
    shear: tuple[float, float] = (0, 0),
    center: list[int] | None = None,
) -> Tensor:
    """Whole pixels of translation, and shear as the share by which a row or column moves."""
    return F.affine(
        picture,
        angle=0.0,
        translate=[int(pixels) for pixels in translate],
        scale=1.0,
        shear=[math.degrees(math.atan(share)) for share in shear],
        center=center,
    )


def _moved(
    picture: Tensor,
    x_from: tuple[float, float] = (1.0, 0.0),
    y_from: tuple[float, float] = (0.0, 1.0),
    shift: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """The picture whose pixel at (x, y) from its centre is the one that was at a linear function.

    Of (x, y), in pixels, its rows ``x_from`` and ``y_from``, plus ``shift``. Interpolated; beyond
    its edges the picture goes on as its mirror image.
    """
    height, width = picture.shape[-2:]
    half_x, half_y = (width - 1) / 2, (height - 1) / 2
    x = torch.linspace(-half_x, half_x, width, device=picture.device)
    y = torch.linspace(-half_y, half_y, height, device=picture.device)[:, None]
    places = [
        (x_from[0] * x + x_from[1] * y + shift[0]) / half_x,
        (y_from[0] * x + y_from[1] * y + shift[1]) / half_y,
    ]
    moved = grid_sample(
        picture[None].float(),
        torch.stack(places, dim=-1)[None],
        padding_mode="reflection",
        align_corners=True,
    )
    return _rounded(moved[0])


def _turned(picture: Tensor, degrees: float) -> Tensor:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _moved(picture, (cos, -sin), (sin, cos))


def _blended(adjust: Function) -> Function:
    """torchvision's, at a factor of 1 plus the level, of float values: of others it cuts off.

    A white page would become grey by that.
    """
    return lambda picture, level: _rounded(255 * adjust(picture.float() / 255, 1 + level))


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


_RANDAUGMENT: Operations = {
    "Identity": (lambda image, _: image, False),
    "ShearX": (lambda image, level: _affine(image, shear=(level, 0), center=[0, 0]), True),
    "ShearY": (lambda image, level: _affine(image, shear=(0, level), center=[0, 0]), True),
    "TranslateX": (lambda image, level: _affine(image, translate=(level, 0)), True),
    "TranslateY": (lambda image, level: _affine(image, translate=(0, level)), True),
    "Rotate": (lambda image, level: F.rotate(image, level), True),
    "Brightness": (_blended(F.adjust_brightness), True),
    "Color": (_blended(F.adjust_saturation), True),
    "Contrast": (_blended(F.adjust_contrast), True),
    "Sharpness": (_blended(F.adjust_sharpness), True),
    "Posterize": (lambda image, level: F.posterize(image, round(level)), False),
    "Solarize": (lambda image, level: F.solarize(image, level), False),
    "AutoContrast": (lambda image, _: F.autocontrast(image), False),
    "Equalize": (lambda image, _: F.equalize(image), False),
}
_GENTLE: Operations = {
    "Identity": _RANDAUGMENT["Identity"],
    "ShearX": (lambda image, level: _moved(image, x_from=(1.0, level)), True),
    "ShearY": (lambda image, level: _moved(image, y_from=(level, 1.0)), True),
    "TranslateX": (lambda image, level: _moved(image, shift=(-round(level), 0)), True),
    "TranslateY": (lambda image, level: _moved(image, shift=(0, -round(level))), True),
    "Rotate": (_turned, True),
    "Color": _RANDAUGMENT["Color"],
    "Sharpness": _RANDAUGMENT["Sharpness"],
}
OPERATIONS: Mapping[str, Operations] = {"randaugment": _RANDAUGMENT, "gentle": _GENTLE}
"""``randaugment``: operations and scales of torchvision's, but for magnitudes between its bins.
What a geometric operation uncovers becomes black, and some operations act at magnitude 0 too:
AutoContrast and Equalize have no scale, and Solarize turns pure white black. A model learns to draw
such marks. ``gentle``: those that do nothing at magnitude 0 and leave a blank page blank; what they
uncover is the picture's mirror image, and pixels are interpolated."""
