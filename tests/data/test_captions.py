"""What a visit reads of a caption: rates, determinism, and that nothing else is drawn upon."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from iet_sd.config import DataConfig
from iet_sd.data.captions import draw
from iet_sd.data.shards import Visit
from iet_sd.data.sources import load_source
from iet_sd.errors import UserError
from iet_sd.evaluation.prompts import caption_of, prompt_of

TAGS = "one girl, red hair,smile , long coat"


def settings(**given):
    return DataConfig(train_data_dir="pictures", **given)


def read(captions, number=400, **given):
    config = settings(**given)
    return [draw(captions, config, Visit(0, seed)) for seed in range(number)]


def test_captions_are_as_they_are_by_default():
    assert set(read([TAGS], 20)) == {TAGS}
    assert read([], 3) == ["", "", ""]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_share_of_empty_captions(share):
    number = 4000
    empty = read(["a"], number, proportion_empty_prompts=share).count("")
    # Four standard deviations of a binomial count.
    assert abs(empty - share * number) < 4 * (number * share * (1 - share)) ** 0.5


def test_no_and_all_empty_captions():
    assert "" not in read(["a"], proportion_empty_prompts=0.0)
    assert set(read(["a"], proportion_empty_prompts=1.0)) == {""}


def test_prefix_stands_before_every_caption_but_an_empty_one():
    assert set(read(["a", "b"], caption_prefix="sks style,")) == {"sks style, a", "sks style, b"}
    assert set(read([], caption_prefix="sks")) == {""}
    drawn = read(["a"], caption_prefix="sks", proportion_empty_prompts=0.5)
    assert set(drawn) == {"", "sks a"}


@pytest.mark.parametrize("kept", range(6))
def test_tags_are_shuffled_behind_those_that_are_kept(kept):
    tags = ["one girl", "red hair", "smile", "long coat"]
    drawn = [
        text.split(", ") for text in read([TAGS], 1200, shuffle_caption=True, keep_tokens=kept)
    ]
    assert all(sorted(found) == sorted(tags) for found in drawn)
    assert all(found[:kept] == tags[:kept] for found in drawn)
    counts = Counter(map(tuple, drawn))
    orders = {0: 24, 1: 6, 2: 2}.get(kept, 1)
    assert len(counts) == orders
    # Uniform: five standard deviations.
    assert max(counts.values()) - 1200 / orders < 5 * (1200 / orders) ** 0.5


def test_caption_without_commas_is_not_changed_by_shuffling():
    assert set(read(["a cat on a mat"], 20, shuffle_caption=True)) == {"a cat on a mat"}


def test_prefix_is_not_a_tag():
    drawn = read([TAGS], 50, shuffle_caption=True, caption_prefix="in oil,")
    assert all(text.startswith("in oil, ") for text in drawn)
    assert len(set(drawn)) > 5


def test_each_of_several_captions_is_drawn():
    counts = Counter(read(["a", "b", "c"], 900))
    assert all(abs(count - 300) < 70 for count in counts.values())
    assert len(counts) == 3


def test_no_setting_changes_what_another_draws():
    plain = read(["a", "b", "c"])
    assert read(["a", "b", "c"], shuffle_caption=True, caption_prefix="") == plain
    dropped = read(["a", "b", "c"], proportion_empty_prompts=0.3)
    assert [text or same for text, same in zip(dropped, plain, strict=True)] == plain
    # A larger share drops what a smaller one does, and more.
    more = read(["a", "b", "c"], proportion_empty_prompts=0.6)
    assert all(not two for one, two in zip(dropped, more, strict=True) if not one)


def test_global_generators_are_neither_asked_nor_moved():
    """diffusers draws of a list by Python's global generator, which no two workers share."""
    given = {"shuffle_caption": True, "proportion_empty_prompts": 0.2, "caption_prefix": "x"}
    expected = read([TAGS, "a, b, c"], 60, **given)
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
        assert read([TAGS, "a, b, c"], 60, **given) == expected
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert np.random.get_state()[1].tolist() == before[2]


def test_prompts_of_an_evaluation_are_captions_as_they_are_read_in_training(folder, config):
    """With the prefix, which a model that is asked for its training images was trained on."""
    rows = [{"file_name": "a.png", "text": TAGS}, {"file_name": "b.png"}]
    data = config(
        folder(["a.png", "b.png"], rows),
        proportion_empty_prompts=1.0,
        shuffle_caption=True,
        caption_prefix="x",
        on_missing_caption="empty",
    )
    source = load_source(data)
    assert {prompt_of(source, 0, seed, data) for seed in range(20)} == {f"x {TAGS}"}
    assert prompt_of(source, 1, 0, data) == ""
    assert caption_of(source, 0, 0) == TAGS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"proportion_empty_prompts": 1.5}, "must lie in 0 to 1; got 1.5"),
        ({"proportion_empty_prompts": -0.1}, "must lie in 0 to 1; got -0.1"),
        ({"proportion_empty_prompts": float("nan")}, "must lie in 0 to 1; got nan"),
        ({"keep_tokens": -1, "shuffle_caption": True}, "--keep_tokens must not be negative"),
        ({"keep_tokens": 2}, "--shuffle_caption"),
    ],
)
def test_nonsense_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        settings(**given)
