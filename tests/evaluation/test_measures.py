"""Names, texts and assembly of the report's numbers."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from iet_sd.evaluation import measures
from iet_sd.evaluation.closeness import Ratios
from iet_sd.evaluation.measures import Resampling, copying, distances, fidelity, losses, measure
from iet_sd.evaluation.ratio import l2_ratio
from iet_sd.evaluation.run import _headlines
from iet_sd.evaluation.similarity import summarize
from iet_sd.evaluation.statistics import Estimate
from iet_sd.evaluation.texts import TEXTS
from iet_sd.evaluation.verdict import in_words
from tests.evaluation.rates import clustered, coverage

RNG = np.random.default_rng(0)
G, H = 120, 80
BY = Resampling(np.arange(G), np.arange(H), resamples=200)


def named(found):
    return {m.name: m for m in found}


def test_excess_is_the_difference_of_the_two_statistics():
    generated, heldout, train = RNG.random(G), RNG.random(H) * 0.5, RNG.random(300)
    found = named(copying(generated, None, train, heldout, (0.25, 0.5), BY))
    g, h = (summarize(value, (0.25, 0.5)) for value in (generated, heldout))
    assert found["memorization_score"].value == pytest.approx(np.percentile(generated, 95))
    assert found["excess_score"].value == pytest.approx(g["p95"] - h["p95"])
    assert found["excess_mean"].value == pytest.approx(generated.mean() - heldout.mean())
    assert found["excess_share_above_0.25"].value == pytest.approx(
        (generated > 0.25).mean() - (heldout > 0.25).mean()
    )
    assert found["heldout_p95"].value == pytest.approx(np.percentile(heldout, 95))
    assert found["background_p95"].value == pytest.approx(np.percentile(train, 95))
    assert "own_similarity" not in found
    for m in found.values():
        if m.low is not None:
            assert m.low <= m.value <= m.high


def test_without_heldout_images_there_is_no_excess():
    found = named(copying(RNG.random(G), RNG.random(G), RNG.random(9), None, (0.5,), BY))
    assert not [name for name in found if "excess" in name or "heldout" in name]
    assert "own_similarity" in found


def test_losses_tell_members():
    heldout = RNG.normal(1, 0.1, (200, 4))
    by = replace(BY, group_H=np.arange(200))
    found = named(losses(heldout[:100] - 0.5, heldout[100:], np.arange(100), by))
    assert found["membership_auc"].value == 1
    ends = stats.binomtest(100, 100).proportion_ci()
    tpr = found["membership_tpr"]
    assert (tpr.value, tpr.low, tpr.high) == (1, ends.low, ends.high)
    assert found["loss_gap"].low > 0.4
    assert found["heldout_loss"].value == pytest.approx(heldout[100:].mean())
    assert found["membership_tpr"].warning is None
    few = named(losses(heldout[:50], heldout[50:100], np.arange(50), by))
    assert "1 %" in few["membership_tpr"].warning


def test_heldout_images_of_a_group_are_one_in_the_intervals_of_losses():
    """Where they have one loss, as their groups alone; those not measured change nothing."""
    train, of_group = RNG.normal(1, 0.1, (60, 4)), RNG.normal(1.1, 0.1, (20, 4))
    group_H = np.append(RNG.permutation(np.repeat(np.arange(20), 5)), [20, 21])
    index = RNG.permutation(100)
    images = named(losses(train, of_group[group_H[index]], index, replace(BY, group_H=group_H)))
    alone = named(losses(train, of_group, np.arange(20), BY))
    for name in ("loss_gap", "heldout_loss", "membership_auc"):
        for end in ("value", "low", "high"):
            assert getattr(images[name], end) == pytest.approx(getattr(alone[name], end)), name


def test_losses_of_grouped_images_are_covered():
    """Of 20 groups of 10, the group 0.9 of the variance; 0.9 is what so few of them allow."""

    def make(rng, seed):
        heldout, groups = clustered(rng, 20, 10)
        by = Resampling(groups, groups, 100, seed=seed)
        train = rng.normal(size=40)
        found = named(losses(train[:, None], heldout[:, None], np.arange(200), by))
        return [found[name] for name in ("loss_gap", "heldout_loss", "membership_auc")]

    rates = coverage(make, [0, 0, 0.5], repeats=60)
    assert (rates > 0.78).all(), rates


def test_fidelity_names_what_is_shaky():
    found = named(
        fidelity(
            RNG.random((40, 16)), RNG.random((50, 16)), Resampling(np.arange(40), np.arange(50))
        )
    )
    assert list(found)[:3] == ["kid", "kid_spread", "fid"]
    assert {"precision", "recall", "density", "coverage", "vendi"} <= set(found)
    assert found["kid"].low < found["kid"].value < found["kid"].high
    assert [name for name, m in found.items() if m.warning] == ["kid_spread", "fid"]
    assert "all 40 images" in found["kid_spread"].warning


def test_without_prompts_or_groups_to_leave_out_there_is_no_kid():
    by = Resampling(np.arange(40) % 5, np.arange(50) % 2)
    found = named(fidelity(RNG.random((40, 16)), RNG.random((50, 16)), by))
    assert np.isnan(found["kid"].value)
    assert found["kid"].low is None
    assert "at least 3 of each; got 5 and 2" in found["kid"].warning
    assert [m.name for m in _headlines(list(found.values()), "inception") if m.headline] == []
    assert np.isfinite(found["fid"].value)


@pytest.mark.parametrize(("train", "warns"), [(49, True), (50, False), (60, False)])
def test_ratios_of_few_training_images_warn(train, warns):
    distance = np.sort(RNG.random((G, min(train, 50))), axis=1)
    found = distances({"generated": Ratios(distance, l2_ratio(distance))}, BY)
    assert found[0].name == "l2_copies"
    assert {m.warning is not None for m in found} == {warns}
    assert not warns or "49" in found[0].warning


def test_the_verdict_has_the_minus_sign_of_the_tables():
    score, excess = Estimate(0.5, 0.4, 0.6), Estimate(-0.1, -0.2, -0.00001)
    found = [
        replace(measure("Copying", name, value), embedder="sscd-x")
        for name, value in (
            ("memorization_score", score),
            ("excess_score", excess),
            ("heldout_p95", 0.6),
        )
    ]
    said = in_words(found)
    assert "an excess of −0.100 [−0.200, +0.000], by sscd-x." in said


def test_what_warns_is_no_headline():
    names = ("l2_copies", "kid", "fid")
    plain = [measure("Copying", name, 0.1) for name in names]
    assert [m.headline for m in _headlines(plain, "pixels")] == [True, True, False]
    shaky = [replace(m, warning="few") for m in plain]
    assert not any(m.headline for m in _headlines(shaky, "pixels"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("share_above_0.5", "share_above"),
        ("excess_share_above_0.5", "excess_share_above"),
        ("similarity_p90", "similarity"),
        ("mq_15", "mq"),
        ("heldout_p95", "heldout"),
        ("heldout_loss", "heldout_loss"),
        ("excess_score", "excess_score"),
        ("excess_l2_copies", "excess_l2_copies"),
    ],
)
def test_every_name_finds_its_own_text(name, kind):
    assert measure("Copying", name, 1.0).meaning == TEXTS[kind].meaning


def test_an_estimate_brings_its_interval():
    m = measure("Copying", "share_above_0.5", Estimate(0.2, 0.1, 0.3, 0.9))
    assert (m.value, m.low, m.high, m.level) == (0.2, 0.1, 0.3, 0.9)
    assert m.label == "Share above 0.5"


def test_texts_are_sentences():
    for text in TEXTS.values():
        assert text.meaning.endswith(".")
        assert len(text.meaning) < 160


@pytest.mark.parametrize("level", [-1.0, 1.0], ids=["all", "none"])
def test_where_no_image_or_every_one_is_a_copy_the_bound_is_exact(level):
    """Of 60 prompts with two images each, and 80 held-out images; as scipy's binomial test says."""
    by = Resampling(np.arange(G) // 2, np.arange(H), resamples=100)
    generated, heldout = RNG.random(G) * 0.5, RNG.random(H) * 0.5
    found = named(copying(generated, None, RNG.random(9), heldout, (level, 0.2), by))
    share = float(level < 0)
    ends = stats.binomtest(int(60 * share), 60).proportion_ci()
    copies = found[f"share_above_{level:g}"]
    assert (copies.value, copies.low, copies.high) == (share, ends.low, ends.high)
    excess = found[f"excess_share_above_{level:g}"]
    assert excess.low < excess.value == 0 < excess.high
    authentic = measures.authenticity(np.full(G, share > 0), RNG.random(9), by)
    assert (authentic.low, authentic.high) == (ends.low, ends.high)
    assert authentic.warning is None
    # In between nothing is other than the bootstrap's.
    alone = named(copying(generated, None, RNG.random(9), heldout, (0.2,), by))
    for name in ("share_above_0.2", "excess_share_above_0.2", "excess_score"):
        assert found[name] == alone[name]


def test_authenticity_is_not_trusted_where_training_images_are_there_twice():
    """A copy with the least of noise on it is then farther from its original than the twin is."""
    features = RNG.normal(size=(20, 8))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    nearest = lambda others: np.sort(features @ others.T, axis=1)[:, -2]  # noqa: E731
    by = Resampling(np.arange(4), np.arange(4), resamples=100)
    for train, warned in ((features, False), (np.concatenate([features, features]), True)):
        found = measures.authenticity(np.full(4, warned), nearest(train), by)
        assert (found.warning is not None) == warned
    assert "20 of 20" in found.warning
