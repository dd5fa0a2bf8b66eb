"""RandAugment as torchvision's, and operations that leave no marks."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from iet_sd.data.augmentation import OPERATIONS, Augmentation, apply, augment
from iet_sd.errors import UserError

SPACE = RandAugment()._augmentation_space(31, (48, 64))
BLENDS = "Brightness", "Color", "Contrast", "Sharpness"
RAND, GENTLE = OPERATIONS["randaugment"], OPERATIONS["gentle"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def picture(photo):
    return F.pil_to_tensor(photo)


def page(width, height):
    return torch.full((3, height, width), 255, dtype=torch.uint8)


def content(picture):
    return picture.numpy().tobytes()


same = torch.equal


def equals_torchvision(found, photo, op, level):
    """Its operation on tensors; of blends Pillow's, where white stays white, to a level of 255."""
    if op in BLENDS:
        expected = F.pil_to_tensor(_apply_op(photo, op, level, InterpolationMode.NEAREST, None))
        return (found.int() - expected).abs().max() <= 1
    picture = F.pil_to_tensor(photo)
    return same(found, _apply_op(picture, op, level, InterpolationMode.NEAREST, None))


@pytest.mark.parametrize("op", list(SPACE))
@pytest.mark.parametrize("magnitude", [0, 1, 5, 30])
@pytest.mark.parametrize("negative", [False, True])
def test_operations_equal_torchvision(photo, picture, op, magnitude, negative):
    scale, signed = SPACE[op]
    level = float(scale[magnitude]) if scale.ndim else 0.0
    level = -level if signed and negative else level
    found = apply(picture, op, Augmentation(magnitude), negative)
    assert equals_torchvision(found, photo, op, level)


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
def test_fractional_magnitude_lies_between_bins(photo, picture, op, level):
    found = apply(picture, op, Augmentation(2.5), False)
    assert equals_torchvision(found, photo, op, level)


def test_every_operation_and_sign_is_drawn(picture):
    results = {op: set() for op in RAND}
    by_picture = {
        content(apply(picture, op, Augmentation(9.0), negative)): (op, negative)
        for op in RAND
        for negative in (False, True)
    }
    for seed in range(400):
        op, negative = by_picture[content(augment(picture, Augmentation(9.0, 1), seeded(seed)))]
        results[op].add(negative)
    for op, signs in results.items():
        assert len(signs) == (2 if RAND[op][1] else 1), op


def test_it_uses_its_generator_alone(picture):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = augment(picture, Augmentation(9.0, 4), seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(one, augment(picture, Augmentation(9.0, 4), seeded(5)))


@pytest.mark.parametrize("magnitude", [-0.1, 30.1])
def test_magnitude_off_the_scale(picture, magnitude):
    with pytest.raises(UserError, match="0 to 30"):
        augment(picture, Augmentation(magnitude, 1), seeded(0))


def gently(image, op, magnitude, negative):
    return apply(image, op, Augmentation(magnitude, operations="gentle"), negative)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("op", GENTLE)
def test_gentle_operations_do_nothing_at_rest_and_leave_a_blank_page_blank(picture, op, negative):
    assert same(gently(picture, op, 0.0, negative), picture)
    for size in ((64, 48), (16, 90), (90, 16), (33, 33)):
        blank = page(*size)
        assert same(gently(blank, op, 30.0, negative), blank)
    assert op == "Identity" or not same(gently(picture, op, 10.0, negative), picture)


def test_others_leave_marks(picture):
    """Which is why there are gentle ones."""
    blank = page(64, 48)
    marks = {op for op in RAND if not same(apply(blank, op, Augmentation(10.0), True), blank)}
    acts = {op for op in RAND if not same(apply(picture, op, Augmentation(0.0), False), picture)}
    assert {"ShearX", "Rotate", "TranslateX", "Brightness", "Solarize"} <= marks
    assert {"AutoContrast", "Equalize"} <= acts
    assert not {"Identity", "Color", "Sharpness"} & (marks | acts)


@pytest.mark.parametrize(("op", "axis"), [("TranslateX", 2), ("TranslateY", 1)])
def test_what_a_gentle_shift_uncovers_is_the_mirror_image(picture, op, axis):
    size = picture.shape[axis]
    by = round(150 / 331 * size / 3)
    # Towards larger places; the edge itself is there once.
    places = np.abs(np.arange(size) - by)
    expected = picture.numpy().take(places, axis=axis)
    assert (gently(picture, op, 10.0, False).numpy() == expected).all()


def by_pillow(photo, op, level):
    """A gentle operation by Pillow and numpy: mirrored far enough beyond the edges, and cropped."""
    if op in BLENDS:
        return np.asarray(_apply_op(photo, op, level, InterpolationMode.NEAREST, None))
    height, width = np.asarray(photo).shape[:2]
    wider = np.pad(np.asarray(photo), ((40, 40), (40, 40), (0, 0)), mode="reflect")
    degrees = float(np.degrees(np.arctan(level)))
    angle, shear = {
        "Rotate": (-level, [0.0, 0.0]),
        "ShearX": (0.0, [degrees, 0.0]),
        "ShearY": (0.0, [0.0, degrees]),
    }[op]
    how = {"interpolation": InterpolationMode.BILINEAR}
    moved = F.affine(Image.fromarray(wider), angle, [0, 0], 1.0, shear, **how)
    return np.asarray(F.center_crop(moved, [height, width]))


@pytest.mark.parametrize("size", [(64, 48), (33, 65)])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("op", ["Rotate", "ShearX", "ShearY", "Color", "Sharpness"])
def test_gentle_operations_are_pillows_to_a_level_of_255(photo, op, negative, size):
    photo = photo.resize(size)
    level = {"Rotate": 10.0, "ShearX": 0.1, "ShearY": 0.1}.get(op, 0.3)
    found = gently(F.pil_to_tensor(photo), op, 10.0, negative).permute(1, 2, 0).numpy()
    expected = by_pillow(photo, op, -level if negative else level)
    assert abs(found.astype(int) - expected).max() <= 1


def test_every_gentle_operation_and_sign_is_drawn(picture):
    how = Augmentation(9.0, 1, "gentle")
    drawn = {content(augment(picture, how, seeded(seed))) for seed in range(200)}
    expected = {content(gently(picture, op, 9.0, neg)) for op in GENTLE for neg in (False, True)}
    assert drawn == expected
    assert len(expected) == 1 + 2 * 7


@pytest.mark.parametrize("op", GENTLE)
def test_gentle_operations_read_nothing_back_from_the_device(picture, op):
    """One that has no values: whatever asks for some there fails."""
    assert gently(picture.to("meta"), op, 10.0, True).device.type == "meta"
