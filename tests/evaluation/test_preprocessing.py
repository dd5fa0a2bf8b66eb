import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from iet_sd.evaluation.preprocessing import LEGACY_DCR, SSCD, thumbnail

# Width and height: landscape, portrait, square, smaller than any crop, odd, long.
SIZES = [(320, 256), (300, 451), (256, 256), (40, 36), (257, 511), (700, 233)]


def picture(size, seed=0):
    width, height = size
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def flat(color, size=(20, 20)):
    return Image.new("RGB", size, color)


@pytest.mark.parametrize("size", SIZES)
def test_legacy_dcr_is_the_steps_of_dcr(size):
    """Resize 256, CenterCrop 224, ToTensor, Normalize(.5, .5), done by hand with Pillow."""
    width, height = size
    short = min(size)
    scaled = (int(256 * width / short), int(256 * height / short))
    image = picture(size).resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((scaled[0] - 224) / 2), round((scaled[1] - 224) / 2)
    image = image.crop((left, top, left + 224, top + 224))
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
    expected = torch.from_numpy((pixels - 0.5) / 0.5)
    found = LEGACY_DCR(picture(size))
    assert found.shape == (3, 224, 224)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_legacy_dcr_is_what_its_own_transform_gives():
    own = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    assert torch.equal(LEGACY_DCR(picture((300, 451))), own(picture((300, 451))))


@pytest.mark.parametrize(
    ("size", "shape"),
    [((256, 256), (288, 288)), ((400, 300), (288, 384)), ((300, 600), (576, 288))],
)
def test_sscd_scales_the_shorter_edge_and_crops_nothing(size, shape):
    assert SSCD(picture(size)).shape == (3, *shape)


def test_sscd_normalises_by_imagenet():
    found = SSCD(flat((255, 0, 51)))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(found.mean((1, 2)), torch.tensor(expected), atol=1e-5, rtol=0)
    assert found.std((1, 2)).max() < 1e-5


def test_thumbnail_averages_blocks():
    pixels = np.asarray(picture((96, 64)), dtype=np.float64) / 255  # blocks of 2 rows, 3 columns
    blocks = pixels.reshape(32, 2, 32, 3, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.allclose(thumbnail(picture((96, 64))).numpy(), blocks, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_thumbnail_has_one_size(size):
    assert thumbnail(picture(size)).shape == (3, 32, 32)
    assert torch.allclose(
        thumbnail(flat((255, 51, 0), size)).mean((1, 2)), torch.tensor([1, 0.2, 0])
    )
