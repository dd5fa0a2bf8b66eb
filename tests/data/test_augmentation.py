"""RandAugment as torchvision's, and operations that leave no marks."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from iet_sd.data.augmentation import OPERATIONS, Augmentation, apply, augment
from iet_sd.errors import UserError

SPACE = RandAugment()._augmentation_space(31, (48, 64))
RAND, GENTLE = OPERATIONS["randaugment"], OPERATIONS["gentle"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    return ImageChops.difference(one, other).getbbox() is None


@pytest.mark.parametrize("op", list(SPACE))
@pytest.mark.parametrize("magnitude", [0, 1, 5, 30])
@pytest.mark.parametrize("negative", [False, True])
def test_operations_equal_torchvision(photo, op, magnitude, negative):
    scale, signed = SPACE[op]
    level = float(scale[magnitude]) if scale.ndim else 0.0
    level = -level if signed and negative else level
    expected = _apply_op(photo, op, level, InterpolationMode.NEAREST, None)
    assert same(apply(photo, op, Augmentation(magnitude), negative), expected)


def test_list_of_operations_is_torchvisions():
    assert list(RAND) == list(SPACE)
    assert {op: signed for op, (_, signed) in RAND.items()} == {
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
    assert same(apply(photo, op, Augmentation(2.5), False), expected)


def test_every_operation_and_sign_is_drawn(photo):
    results = {op: set() for op in RAND}
    by_picture = {
        apply(photo, op, Augmentation(9.0), negative).tobytes(): (op, negative)
        for op in RAND
        for negative in (False, True)
    }
    for seed in range(400):
        op, negative = by_picture[augment(photo, Augmentation(9.0, 1), seeded(seed)).tobytes()]
        results[op].add(negative)
    for op, signs in results.items():
        assert len(signs) == (2 if RAND[op][1] else 1), op


def test_it_uses_its_generator_alone(photo):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = augment(photo, Augmentation(9.0, 4), seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(one, augment(photo, Augmentation(9.0, 4), seeded(5)))


@pytest.mark.parametrize("magnitude", [-0.1, 30.1])
def test_magnitude_off_the_scale(photo, magnitude):
    with pytest.raises(UserError, match="0 to 30"):
        augment(photo, Augmentation(magnitude, 1), seeded(0))


def gently(image, op, magnitude, negative):
    return apply(image, op, Augmentation(magnitude, operations="gentle"), negative)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("op", GENTLE)
def test_gentle_operations_do_nothing_at_rest_and_leave_a_blank_page_blank(photo, op, negative):
    assert same(gently(photo, op, 0.0, negative), photo)
    for size in ((64, 48), (16, 90), (90, 16), (33, 33)):
        page = Image.new("RGB", size, "white")
        assert same(gently(page, op, 30.0, negative), page)
    assert op == "Identity" or not same(gently(photo, op, 10.0, negative), photo)


def test_others_leave_marks(photo):
    """Which is why there are gentle ones."""
    page = Image.new("RGB", (64, 48), "white")
    marks = {op for op in RAND if not same(apply(page, op, Augmentation(10.0), True), page)}
    acts = {op for op in RAND if not same(apply(photo, op, Augmentation(0.0), False), photo)}
    assert {"ShearX", "Rotate", "TranslateX", "Brightness", "Solarize"} <= marks
    assert {"AutoContrast", "Equalize"} <= acts
    assert not {"Identity", "Color", "Sharpness"} & (marks | acts)


@pytest.mark.parametrize(("op", "axis"), [("TranslateX", 1), ("TranslateY", 0)])
def test_what_a_gentle_shift_uncovers_is_the_mirror_image(photo, op, axis):
    picture = np.asarray(photo)
    size = picture.shape[axis]
    by = round(150 / 331 * size / 3)
    # Towards larger places; the edge itself is there once.
    expected = picture.take(np.abs(np.arange(size) - by), axis=axis)
    assert (np.asarray(gently(photo, op, 10.0, False)) == expected).all()


@pytest.mark.parametrize("op", ["Rotate", "ShearX", "ShearY"])
def test_gentle_turns_and_shears_are_torchvisions_where_nothing_is_uncovered(photo, op):
    """About the centre, smooth: within a circle that stays in the picture."""
    level = {"Rotate": 10.0}.get(op, 0.1)
    angle, shear = (level, [0.0, 0.0]) if op == "Rotate" else (0.0, None)
    degrees = float(np.degrees(np.arctan(level)))
    shear = shear or ([degrees, 0.0] if op == "ShearX" else [0.0, degrees])
    expected = F.affine(photo, -angle, [0, 0], 1.0, shear, interpolation=InterpolationMode.BILINEAR)
    y, x = np.mgrid[:48, :64]
    inside = (y - 23.5) ** 2 + (x - 31.5) ** 2 < 18**2
    found = np.asarray(gently(photo, op, 10.0, False)).astype(int)
    assert abs(found - np.asarray(expected))[inside].max() <= 1


def test_every_gentle_operation_and_sign_is_drawn(photo):
    how = Augmentation(9.0, 1, "gentle")
    drawn = {augment(photo, how, seeded(seed)).tobytes() for seed in range(200)}
    expected = {gently(photo, op, 9.0, neg).tobytes() for op in GENTLE for neg in (False, True)}
    assert drawn == expected
    assert len(expected) == 1 + 2 * 7
