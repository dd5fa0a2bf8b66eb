import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from iet_sd.data.transforms import OPS, apply_op, rand_augment, view
from iet_sd.errors import UserError

R = 32
SPACE = RandAugment()._augmentation_space(31, (48, 64))


@pytest.fixture
def photo():
    """Noise of 64 x 48 (width x height), not stretched by AutoContrast to nothing."""
    values = np.random.default_rng(0).integers(10, 200, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def view_of(image, seed=0, **settings):
    defaults = {"center_crop": False, "random_flip": True, "interpolation": "lanczos"}
    return view(image, **{"size": (R, R), "generator": seeded(seed)} | defaults | settings)


def see(image, seed=0, **settings):
    return view_of(image, seed, **settings).pixel_values


def same(one, other):
    return ImageChops.difference(one, other).getbbox() is None


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
    for magnitude in (None, 7.5):
        assert torch.equal(see(photo, 3, magnitude=magnitude), see(photo, 3, magnitude=magnitude))
    assert not torch.equal(see(photo, 3), see(photo, 4))


@pytest.mark.parametrize("center_crop", [False, True])
def test_crop_and_flip_do_not_depend_on_augmentation(photo, center_crop):
    for seed in range(10):
        plain = see(photo, seed, center_crop=center_crop)
        # No operations: the rest of the way is the same.
        none = see(photo, seed, center_crop=center_crop, magnitude=5.0, num_ops=0)
        assert torch.equal(plain, none)


def test_augmentation_comes_before_the_crop(photo):
    resized = transforms.Resize(R, interpolation=InterpolationMode.LANCZOS)(photo)
    for seed in range(10):
        generator = seeded(seed)
        torch.rand(3, dtype=torch.float64, generator=generator)
        augmented = rand_augment(resized, 2, 9.0, generator)
        plain = see(augmented, seed)
        assert torch.equal(see(photo, seed, magnitude=9.0), plain)


@pytest.mark.parametrize("op", list(SPACE))
@pytest.mark.parametrize("magnitude", [0, 1, 5, 30])
@pytest.mark.parametrize("negative", [False, True])
def test_operations_equal_torchvision(photo, op, magnitude, negative):
    scale, signed = SPACE[op]
    level = float(scale[magnitude]) if scale.ndim else 0.0
    level = -level if signed and negative else level
    expected = _apply_op(photo, op, level, InterpolationMode.NEAREST, None)
    assert same(apply_op(photo, op, magnitude, negative), expected)


def test_list_of_operations_is_torchvisions():
    assert list(OPS) == list(SPACE)
    assert {op: signed for op, (_, signed) in OPS.items()} == {
        op: signed for op, (_, signed) in SPACE.items()
    }


@pytest.mark.parametrize(
    ("op", "level"),
    [
        ("Brightness", 0.9 * 2.5 / 30),
        ("Rotate", 2.5),
        ("ShearX", 0.3 * 2.5 / 30),
        ("TranslateX", 150 / 331 * 64 * 2.5 / 30),
        ("Solarize", 255 - 255 * 2.5 / 30),
        ("Posterize", 8),
    ],
)
def test_fractional_magnitude_lies_between_bins(photo, op, level):
    expected = _apply_op(photo, op, level, InterpolationMode.NEAREST, None)
    assert same(apply_op(photo, op, 2.5, False), expected)


def test_rand_augment_draws_every_operation_and_sign(photo):
    results = {op: set() for op in OPS}
    by_picture = {
        apply_op(photo, op, 9.0, negative).tobytes(): (op, negative)
        for op in OPS
        for negative in (False, True)
    }
    for seed in range(400):
        op, negative = by_picture[rand_augment(photo, 1, 9.0, seeded(seed)).tobytes()]
        results[op].add(negative)
    for op, signs in results.items():
        assert len(signs) == (2 if OPS[op][1] else 1), op


def test_rand_augment_uses_its_generator_alone(photo):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = rand_augment(photo, 4, 9.0, seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(one, rand_augment(photo, 4, 9.0, seeded(5)))


@pytest.mark.parametrize("magnitude", [-0.1, 30.1])
def test_magnitude_off_the_scale(photo, magnitude):
    with pytest.raises(UserError, match="0 to 30"):
        rand_augment(photo, 1, magnitude, seeded(0))
