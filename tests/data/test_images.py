import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from iet_sd.data.images import decode
from iet_sd.errors import UserError

RED, GREEN = (255, 0, 0), (0, 255, 0)


def encoded(image, suffix="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(record):
    image = decode(record, "x")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.fixture
def photo():
    """8-bit noise of 7 x 5."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


def test_rgb_is_unchanged(photo):
    assert np.array_equal(pixels(encoded(photo)), np.asarray(photo))


def test_path_is_read(photo, tmp_path):
    photo.save(tmp_path / "x.png")
    record = {"bytes": None, "path": str(tmp_path / "x.png")}
    assert np.array_equal(pixels(record), np.asarray(photo))


def test_path_into_an_archive_is_read(photo, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", encoded(photo)["bytes"])
    record = {"bytes": None, "path": f"zip://a.png::{tmp_path / 'x.zip'}"}
    assert np.array_equal(pixels(record), np.asarray(photo))


def test_palette(photo):
    palette = photo.quantize(16)
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))


def test_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_alpha_is_laid_over_white(photo):
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7, 1), dtype=np.uint8)
    rgba = Image.fromarray(np.concatenate([np.asarray(photo), alpha], axis=2))
    share = alpha / 255
    expected = share * np.asarray(photo) + (1 - share) * 255
    assert np.abs(pixels(encoded(rgba)) - expected).max() <= 1


def test_grey_with_alpha():
    image = Image.fromarray(np.array([[[0, 255], [0, 0], [0, 51]]], dtype=np.uint8))
    assert image.mode == "LA"
    assert pixels(encoded(image))[0, :, 0].tolist() == [0, 255, 204]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_colour_of_png(mode):
    clear = RED if mode == "RGB" else 7
    image = Image.new(mode, (1, 1), clear)
    assert pixels(encoded(image, transparency=clear)).tolist() == [[[255, 255, 255]]]


def test_one_bit():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image))[0, :, 2].tolist() == [0, 255]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(encoded(image, "JPEG", quality=100)) - RED).max() <= 3


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(suffix):
    values = np.array([[0, 257, 128 * 257, 65535, 300]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert pixels(encoded(image, suffix))[0, :, 1].tolist() == [0, 1, 128, 255, 1]


def test_float_tiff():
    image = Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32))
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 51, 255]
    image = Image.fromarray(np.array([[0, 51, 255]], dtype=np.float32))
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("bad", [-1, 256, np.nan])
def test_float_tiff_off_the_scale(bad):
    image = Image.fromarray(np.array([[0.5, bad]], dtype=np.float32))
    with pytest.raises(UserError, match=r"^photo\.tif: grey values"):
        decode(encoded(image, "TIFF"), "photo.tif")


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (8, np.rot90),
    ],
)
def test_exif_rotation(photo, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encoded(photo, exif=exif)), turn(np.asarray(photo)))


def test_first_frame_of_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN)]
    record = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(record)[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_file_is_named(photo, suffix):
    content = encoded(photo.resize((64, 64)), suffix)["bytes"]
    with pytest.raises(UserError, match=r"^cut\.file: \S"):
        decode({"bytes": content[: len(content) // 2], "path": None}, "cut.file")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"bytes": b"just words", "path": None}, "not an image"),
        ({"bytes": b"", "path": None}, "not an image"),
        ({"bytes": None, "path": "nowhere.png"}, "no such file"),
        ({"bytes": None, "path": None}, "no image"),
        (None, "no image"),
    ],
)
def test_what_is_no_image_is_named(record, reason):
    with pytest.raises(UserError, match=rf"^sample 7: .*{reason}"):
        decode(record, "sample 7")
