import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from iet_sd.data.augmentation import Augmentation, augment
from iet_sd.data.transforms import draw_placing, view

R = 32


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def view_of(image, seed=0, augmentation=None, **settings):
    generator = seeded(seed)
    defaults = {
        "size": (R, R),
        "center_crop": False,
        "random_flip": True,
        "interpolation": "lanczos",
        "placing": draw_placing(generator),
        "augmented": augmentation and (augmentation, generator),
    }
    return view(image, **defaults | settings)


def see(image, seed=0, **settings):
    return view_of(image, seed, **settings).pixel_values


@pytest.mark.parametrize("mode", [mode.lower() for mode in InterpolationMode.__members__])
@pytest.mark.parametrize("size", [(64, 48), (20, 33), (R, R)])
def test_centre_view_equals_torchvision(photo, mode, size):
    image = photo.resize(size)
    expected = transforms.Compose(
        [
            transforms.Resize(R, interpolation=InterpolationMode[mode.upper()]),
            transforms.CenterCrop(R),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )(image)
    seen = see(image, center_crop=True, random_flip=False, interpolation=mode)
    assert seen.dtype == torch.float32
    assert torch.equal(seen, expected)


def test_random_view_is_a_window_of_the_resized_image(photo):
    whole = transforms.Compose(
        [
            transforms.Resize(R, interpolation=InterpolationMode.LANCZOS),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )(photo)
    windows = {}
    for left in range(whole.shape[2] - R + 1):
        window = whole[:, :, left : left + R]
        windows[window.numpy().tobytes()] = (left, False)
        windows[window.flip(2).contiguous().numpy().tobytes()] = (left, True)
    seen = [windows[see(photo, seed).contiguous().numpy().tobytes()] for seed in range(300)]
    # Every place and both directions come up: a place is missed with probability < 1e-5.
    assert {left for left, _ in seen} == set(range(whole.shape[2] - R + 1))
    assert 110 < sum(flipped for _, flipped in seen) < 190


def whole_of(image, size):
    return F.normalize(
        F.to_tensor(image.resize(size[::-1], Image.Resampling.LANCZOS)), [0.5], [0.5]
    )


@pytest.mark.parametrize("center_crop", [False, True])
@pytest.mark.parametrize("original", [(64, 48), (48, 64), (20, 33), (R, R), (7, 90)])
@pytest.mark.parametrize("size", [(R, R), (24, 40), (40, 16)])
def test_crop_is_told(photo, original, size, center_crop):
    """In the resized image, or in its mirror image, the crop told is what is seen: SDXL's order."""
    image = photo.resize(original[::-1])
    (H, W), (h, w) = size, original
    scale = max(H / h, W / w)
    flips = set()
    for seed in range(12):
        seen = view_of(image, seed, size=size, center_crop=center_crop)
        assert seen.original_size == original
        top, left = seen.crop_top_left
        resized = max(H, int(scale * h + 1e-9)), max(W, int(scale * w + 1e-9))
        whole = whole_of(image, resized)
        assert top == 0 or left == 0
        if center_crop:
            assert abs(2 * top - (resized[0] - H)) <= 1
            assert abs(2 * left - (resized[1] - W)) <= 1
        crops = [side[:, top : top + H, left : left + W] for side in (whole, whole.flip(2))]
        found = [torch.equal(seen.pixel_values, crop) for crop in crops]
        assert any(found)
        flips.add(found[1])
    assert flips == {False, True}


def test_no_flip_unless_asked(photo):
    for seed in range(20):
        plain = see(photo, seed, center_crop=True, random_flip=False)
        assert torch.equal(plain, see(photo, 0, center_crop=True, random_flip=False))


def test_one_seed_one_view(photo):
    for how in (None, Augmentation(7.5)):
        assert torch.equal(see(photo, 3, augmentation=how), see(photo, 3, augmentation=how))
    assert not torch.equal(see(photo, 3), see(photo, 4))


@pytest.mark.parametrize("center_crop", [False, True])
def test_crop_and_flip_do_not_depend_on_augmentation(photo, center_crop):
    for seed in range(10):
        plain = see(photo, seed, center_crop=center_crop)
        # No operations: the rest of the way is the same.
        none = see(photo, seed, center_crop=center_crop, augmentation=Augmentation(5.0, 0))
        assert torch.equal(plain, none)


def test_augmentation_comes_before_the_crop(photo):
    resized = transforms.Resize(R, interpolation=InterpolationMode.LANCZOS)(photo)
    for seed in range(10):
        generator = seeded(seed)
        torch.rand(3, dtype=torch.float64, generator=generator)
        augmented = augment(F.pil_to_tensor(resized), Augmentation(9.0), generator)
        plain = see(F.to_pil_image(augmented), seed)
        assert torch.equal(see(photo, seed, augmentation=Augmentation(9.0)), plain)
