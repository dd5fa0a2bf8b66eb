"""Sizes of batches: which there are, and which one an image goes to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iet_sd.config import DataConfig
from iet_sd.config.buckets import auto_buckets, nearest, parse_buckets
from iet_sd.data.sources import load_source
from iet_sd.errors import UserError

SIDES = st.integers(1, 5000)


def test_explicit_sizes_are_height_and_width():
    assert parse_buckets("512,768; 768 , 512;640,640", 64, 64) == (
        (512, 768),
        (768, 512),
        (640, 640),
    )


def test_auto_sizes_of_512():
    expected = {(512, 512), (448, 576), (384, 640), (320, 768), (256, 1024)}
    assert set(auto_buckets(512, 64)) == expected | {size[::-1] for size in expected}


@given(resolution=st.integers(2, 200).map(lambda n: 8 * n), step=st.integers(1, 16))
def test_auto_sizes_keep_the_area(resolution, step):
    step *= 8
    try:
        sizes = auto_buckets(resolution, step)
    except UserError:
        # No oblong at all: the next shorter side leaves no room for a longer one.
        for short in range(step, resolution, step):
            if 2 * short >= resolution:
                assert resolution**2 // short // step * step <= short
        return
    assert sizes[0] == (resolution, resolution)
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes[1:]:
        short, long = sorted((height, width))
        assert height % step == width % step == 0
        assert resolution / 2 <= short < long
        assert short * long <= resolution**2 < short * (long + step)
        assert (width, height) in sizes


@given(size=st.tuples(SIDES, SIDES), resolution=st.sampled_from([256, 512, 768, 1024]))
def test_nearest_is_that_of_the_least_factor(size, resolution):
    buckets = auto_buckets(resolution, 64)

    def distance(bucket):
        return abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1]))

    assert distance(nearest(size, buckets)) <= min(map(distance, buckets)) + 1e-12


def test_a_tie_goes_to_the_first():
    # 2 : 1 lies between 1 : 1 and 4 : 1, by factors.
    assert nearest((200, 100), ((64, 64), (128, 32))) == (64, 64)
    assert nearest((200, 100), ((128, 32), (64, 64))) == (128, 32)


def test_an_image_as_it_is_seen_goes_to_the_nearest(folder, config):
    """Turned by its EXIF tag; whether all of it is decoded or its size alone is read."""
    root = folder(["wide.png", "tall.jpg", "turned.jpg", "square.webp"])
    for name, size in [("wide.png", (60, 30)), ("tall.jpg", (20, 44)), ("square.webp", (33, 32))]:
        Image.new("RGB", size).save(root / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 25)).save(root / "turned.jpg", exif=exif)
    for check_images in ("all", "none"):
        source = load_source(
            config(
                root,
                resolution=32,
                aspect_ratio_buckets="auto",
                bucket_reso_steps=8,
                check_images=check_images,
            )
        )
        found = dict(zip(source.sample_ids, source.sizes, strict=True))
        assert found == {
            "wide.png": (24, 40),
            "tall.jpg": (40, 24),
            "turned.jpg": (40, 24),
            "square.webp": (32, 32),
        }


def test_an_image_without_a_size_is_named(folder, config):
    root = folder(["a.png", "b.png"])
    (root / "b.png").write_text("words")
    with pytest.raises(UserError, match=r"b\.png: not an image"):
        load_source(config(root, check_images="none", aspect_ratio_buckets="8,16;16,8"))


def test_without_buckets_every_image_is_a_square(folder, config):
    assert load_source(config(folder(["a.png", "b.png"]), resolution=24)).sizes == ((24, 24),) * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aspect_ratio_buckets": "wide"}, "must be auto, or sizes like .* got 'wide'"),
        ({"aspect_ratio_buckets": ""}, "must be auto"),
        ({"aspect_ratio_buckets": "512x768"}, "must be auto"),
        ({"aspect_ratio_buckets": "512,768;"}, "must be auto"),
        ({"aspect_ratio_buckets": "512,-768"}, "must be auto"),
        ({"aspect_ratio_buckets": "512,764"}, "multiples of 8; got '512,764'"),
        ({"aspect_ratio_buckets": "0,512"}, "multiples of 8"),
        ({"aspect_ratio_buckets": "512,768;256,384"}, "512,768 and 256,384 are of one shape"),
        ({"aspect_ratio_buckets": "512,768;512,768"}, "of one shape"),
        ({"aspect_ratio_buckets": "auto", "resolution": 64}, "Lower --bucket_reso_steps"),
        ({"bucket_reso_steps": 20}, "multiple of 8; got 20"),
        ({"bucket_reso_steps": 0}, "multiple of 8; got 0"),
    ],
)
def test_nonsense_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        DataConfig(train_data_dir="pictures", **given)
