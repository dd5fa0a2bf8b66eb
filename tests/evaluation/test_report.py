"""The report's files, for tools and people: they read back as written."""

import html.parser
import json
import re

import numpy as np
import pyarrow.parquet as parquet
import pytest

from iet_sd.evaluation.report import IMAGES, PAIRS, format_measure, histogram_plot, interval_bar
from tests.evaluation.a_report import (
    HISTOGRAM,
    PAIRS_GIVEN,
    PROMPTS,
    REPORT,
    ROWS,
    measure,
    pair,
    read_json,
    write,
)


class Page(html.parser.HTMLParser):
    """What a parser of HTML makes of the page: its tags, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)
        self.inside = False


def test_json_and_parquet_read_back_as_given(tmp_path):
    shuffled = [PAIRS_GIVEN[i] for i in np.random.default_rng(0).permutation(len(PAIRS_GIVEN))]
    write(tmp_path / "evaluation", pairs=shuffled)
    assert read_json(tmp_path / "evaluation" / "report.json") == {"schema_version": 2, **REPORT}
    table = parquet.read_table(tmp_path / "evaluation" / "pairs.parquet")
    assert table.schema.equals(PAIRS)
    assert table.to_pylist() == PAIRS_GIVEN
    table = parquet.read_table(tmp_path / "evaluation" / "images.parquet")
    assert table.schema.equals(IMAGES)
    assert table.to_pylist() == ROWS


def test_arrays_are_numbers_and_what_is_not_finite_is_null(tmp_path):
    row = pair(0, ratio=np.float32("nan"), similarity=np.float32(0.5), flipped=np.bool_(True))
    row["nearest_index"] = np.int64(3)
    counts = HISTOGRAM | {"generated": np.array([0, 1, 3, 4]), "heldout": None}
    measures = [measure(float("nan"), float("-inf"), np.float64(0.5))]
    write(tmp_path, REPORT | {"measures": measures, "histograms": [counts]}, [row])
    written = read_json(tmp_path / "report.json")
    assert [written["measures"][0][key] for key in ("value", "low", "high")] == [None, None, 0.5]
    assert written["histograms"][0]["generated"] == [0, 1, 3, 4]
    (read,) = parquet.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert read == row | {"ratio": None}


def test_same_input_same_files(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    pages = ["report.html", "report.json", "report_public.html"]
    assert names == ["images.parquet", "pairs.parquet", *pages]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_an_error_leaves_the_earlier_report(tmp_path):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(IndexError):
        write(tmp_path, pairs=[pair(0, nearest_index=5)])
    with pytest.raises(ValueError, match="not-a-number"):
        write(tmp_path, pairs=[pair(0, image="not-a-number")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_the_closest_pairs_are_shown_and_no_path(tmp_path):
    write(tmp_path, shown=3)
    page = (tmp_path / "report.html").read_text("utf-8")
    data = json.loads(Page(page).scripts[0])
    assert [pair["similarity"] for pair in data["pairs"]] == pytest.approx([0.95, 0.9, 0.85])
    assert list(data["train"]) == ["0", "1", "2"]
    assert "generations/" not in page


def test_own_image_is_where_its_similarity_is_the_largest(tmp_path):
    own = [None, 0.8, 0.8 - 1e-7, 0.79]
    rows = [pair(i, similarity=0.8, own_similarity=value) for i, value in enumerate(own)]
    data = json.loads(Page((write(tmp_path, pairs=rows) / "report.html").read_text()).scripts[0])
    assert [pair["is_own"] for pair in data["pairs"]] == [False, True, True, False]


def test_hostile_text_stays_text(tmp_path):
    page = Page((write(tmp_path) / "report.html").read_text("utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [pair["prompt"] for pair in json.loads(page.scripts[0])["pairs"]] == PROMPTS
    assert not {"s", "b", "i"} & {tag for tag, attrs in page.tags if not attrs}
    links = {key for _, attrs in page.tags for key in attrs} & {"src", "href", "srcset"}
    assert not links


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((0.612345, 0.58, 0.64), ("0.612", "0.580 to 0.640")),
        ((0.5, 0.49991, 0.50009), ("0.500000", "0.499910 to 0.500090")),
        ((0.00123, 0.00119, 0.00127), ("0.001230", "0.001190 to 0.001270")),
        ((0.05601, 0.05599, 0.05603), ("0.056010", "0.055990 to 0.056030")),
        ((-4.3, -5.2, -3.3), ("−4.30", "−5.20 to −3.30")),
        ((1234.5, 1100, 1390), ("1,234", "1,100 to 1,390")),
        ((0.0, 0.0, 0.0), ("0.00", "0.00 to 0.00")),
        ((48.2137,), ("48.2", "")),
        ((0.0123,), ("0.0123", "")),
        ((0.00004,), ("4.0e−05", "")),
        ((17,), ("17", "")),
        ((17.0,), ("17", "")),
        ((None,), ("–", "")),
        ((0.25, None, 0.5), ("0.250", "")),
    ],
)
def test_numbers_have_the_digits_their_interval_bears(given, shown):
    assert format_measure(measure(*given)) == shown


@pytest.mark.parametrize(
    ("given", "changes", "shown", "labels"),
    [
        ((0.25, 0.2, 0.4), {}, (20, 25, 40), ["0", "0.5", "1"]),
        ((0.1, -0.05, 0.15), {}, (37.5, 75, 87.5), ["−0.2", "0", "0.2"]),
        ((-5, -10, 5), {"better": "zero"}, (0, 25, 75), ["−10", "0", "10"]),
        ((0, 0, 0), {"better": "zero"}, (50, 50, 50), ["−1", "0", "1"]),
    ],
)
def test_bars_are_to_scale(given, changes, shown, labels):
    bar = interval_bar(measure(*given, **changes))
    assert (bar["low"], bar["value"], bar["high"]) == pytest.approx(shown)
    assert [label for _, label in bar["ticks"]] == labels
    assert [x for x, _ in bar["ticks"]] == pytest.approx([0, 50, 100])


@pytest.mark.parametrize(
    "given",
    [
        measure(0.5),
        measure(None, 0, 1),
        measure(0.5, 0.4, 0.6, section="Quality"),
        measure(0.02, 0.01, 0.03, section="Membership", name="heldout_loss"),
        measure(9, 8, 10),
    ],
)
def test_no_bar_without_interval_or_common_scale(given):
    assert interval_bar(given) is None


def test_histogram_shows_the_share_of_each_sets_images():
    plot = histogram_plot(HISTOGRAM, REPORT["measures"])
    drawn = {series["name"]: series for series in plot["series"]}
    assert list(drawn) == ["train", "heldout", "generated"]
    for name, series in drawn.items():
        steps = re.findall(r"V([\d.]+)H([\d.]+)", series["path"])
        heights = np.array([max(100 - float(y), 0) for y, _ in steps])
        assert heights / heights.sum() == pytest.approx(
            np.array(HISTOGRAM[name]) / sum(HISTOGRAM[name]), abs=1e-3
        )
        assert [float(x) for _, x in steps] == pytest.approx([25, 50, 75, 100])
        assert series["images"] == sum(HISTOGRAM[name])
    # One scale for all: the highest share is 6 of 10, and 50% is drawn at 5/6 of its height.
    assert "V4.00" in drawn["heldout"]["path"]
    assert dict(map(reversed, plot["y_ticks"]))["40%"] == pytest.approx(100 - 96 * 4 / 6)
    assert [label for _, label in plot["x_ticks"]] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert drawn["generated"]["p95"] == (pytest.approx(61), "0.610")
    assert drawn["heldout"]["p95"][0] == pytest.approx(40)
    assert drawn["train"]["p95"] is None
    assert plot["bins"][1]["text"].splitlines() == [
        "0.25 to 0.5",
        "Generated: 1 (12.5%)",
        "Held-out: 6 (60.0%)",
        "Train–train: 10 (50.0%)",
    ]


def test_histogram_without_heldout_images_or_of_nothing():
    plot = histogram_plot(HISTOGRAM | {"heldout": None, "generated": [0, 0, 0, 0]}, [])
    assert [series["name"] for series in plot["series"]] == ["train", "generated"]
