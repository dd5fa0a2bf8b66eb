"""From an RGB picture to what a network sees.

Letters in shapes: H height, W width.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

# Pixels along each edge of what the `pixels` embedder compares.
THUMBNAIL = 32


@dataclass(frozen=True)
class ResizeCropNormalize:
    """Resize the shorter edge, crop the centre, scale to [0, 1], normalise: (3, H, W) float32.

    The resize is Pillow's bilinear one, antialiased, on 8-bit values, as torchvision's Resize does
    it by default. Without ``crop`` the proportions of the picture stay, and so H and W differ.
    """

    resize: int
    crop: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    words: str
    """The same for a reader."""

    def __call__(self, image: Image.Image) -> Tensor:
        """``image`` (mode RGB) as (3, H, W)."""
        image = F.resize(image, self.resize, InterpolationMode.BILINEAR)
        if self.crop is not None:
            image = F.center_crop(image, [self.crop, self.crop])
        return F.normalize(F.to_tensor(image), self.mean, self.std)


SSCD = ResizeCropNormalize(
    resize=288,
    crop=None,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    words="shorter edge to 288, ImageNet mean and std",
)
"""What the authors of SSCD recommend (github.com/facebookresearch/sscd-copy-detection)."""

LEGACY_DCR = ResizeCropNormalize(
    resize=256,
    crop=224,
    mean=(0.5,),
    std=(0.5,),
    words="as DCR: shorter edge to 256, center crop 224, mean and std 0.5",
)
"""What DCR and IET-AGC feed to every network (github.com/somepago/DCR, diff_retrieval.py)."""


def thumbnail(image: Image.Image) -> Tensor:
    """``image`` averaged over areas to 32 x 32, whatever its proportions: (3, 32, 32) in [0, 1]."""
    pixels = F.to_tensor(image)[None]
    return torch.nn.functional.interpolate(pixels, size=(THUMBNAIL, THUMBNAIL), mode="area")[0]
