"""What is encoded beforehand, and what of it is refused or left."""

from dataclasses import replace

import pytest

from iet_sd.data.latents import Texts
from iet_sd.engine.beforehand import choose
from iet_sd.errors import UserError
from tests.engine.preparing import FITTING, prepare


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"center_crop": False}, ["random crop", "--cache_crops"]),
        ({"check_images": "none"}, ["--check_images none"]),
        ({"shuffle_caption": True}, ["captions", "--shuffle_caption"]),
        ({"train_text_encoder": True}, ["captions", "--train_text_encoder"]),
    ],
)
def test_what_cannot_be_cached_is_refused_or_left(settings, given, words):
    given = FITTING | given
    with pytest.raises(UserError) as error:
        prepare(settings(cache="on", **given))
    assert all(word in str(error.value) for word in [*words, "--cache auto"])
    _, _, dataset = prepare(settings(cache="auto", **given))
    about_images = "captions" not in words
    assert (dataset.latents is None) == about_images
    assert isinstance(dataset.read, Texts) == about_images
    told = choose(settings(cache="auto", **given), dataset.source, 10**6).describe()
    assert all(word in told for word in words)
    assert "16 " in told


def test_auto_encodes_beforehand_only_what_is_visited_more_often(settings):
    config = settings(cache="auto", random_flip=True, **FITTING)
    for visits, (texts, latents) in {
        15: (False, False),
        16: (True, False),
        31: (True, False),
        32: (True, True),
    }.items():
        _, _, dataset = prepare(config, visits)
        assert isinstance(dataset.read, Texts) == texts
        assert (dataset.latents is not None) == latents


def test_off_makes_nothing(settings, tmp_path):
    _, _, dataset = prepare(settings(cache="off", **FITTING))
    assert dataset.latents is None
    assert not (tmp_path / "cache" / "iet_sd").exists()
    assert replace(dataset.source, digests=()).spare is True
