"""Groups: what the user says, what is the same, and what follows from both."""

import itertools
import json
import shutil

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_sd.data.groups import group
from iet_sd.data.shards import split
from iet_sd.data.sources import load_source
from tests.data.reading import error_of, png, table


def test_equal_files_are_one_group(folder, config):
    root = folder(["a.png", "b.png", "c.png"])
    shutil.copy(root / "a.png", root / "c.png")
    first, second, third = load_source(config(root)).groups
    assert first == third != second


def test_group_column(config, tmp_path):
    table(5, family=["f", "g", "f", None, None]).save_to_disk(tmp_path / "x")
    groups = load_source(config(tmp_path / "x", group_column="family")).groups
    assert groups[0] == groups[2]
    assert len(set(groups)) == 4  # a row without a family is alone
    assert "family" in error_of(config(tmp_path / "x", group_column="nothing"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "table"])
def test_cells_that_are_left_empty_are_no_group(folder, config, tmp_path, kind):
    """Whatever a reader makes of them; nor are they repeats."""
    root = folder(["a.png", "b.png", "c.png", "d.png"], rows=[])
    if kind == "csv":
        lines = ["a.png,a,f,", "b.png,b,,", "c.png,c,,2", "d.png,d, ,"]
        (root / "metadata.csv").write_text("\n".join(["file_name,text,family,n", *lines]))
    elif kind == "jsonl":
        # As pandas writes it.
        nan = float("nan")
        cells = [("a", "f", nan), ("b", nan, nan), ("c", None, 2), ("d", "", None)]
        rows = [{"file_name": f"{c}.png", "text": c, "family": f, "n": n} for c, f, n in cells]
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        root = tmp_path / "table"
        table(4, family=["f", "", None, " "], n=["", " ", "2", None]).save_to_disk(root)
    source = load_source(config(root, group_column="family", repeats_column="n"))
    assert source.groups[0] == "group f"
    assert len(set(source.groups)) == 4
    assert source.repeats == (1, 1, 2, 1)


def test_equal_files_are_one_group_whatever_the_group_column_says(config, tmp_path):
    """Of a, a, a, b, b, c, c, d, e by pixels: two families meet in a; c and d have none."""
    images = [png(i) for i in (0, 0, 0, 1, 1, 2, 2, 3, 4)]
    families = ["g", None, "f", "g", None, "", None, None, "h"]
    data = table(9).remove_columns("image").add_column("family", families)
    data = data.add_column("image", images).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "x")
    source = load_source(config(tmp_path / "x", group_column="family"))
    c, d = source.digests[5], source.digests[7]
    expected = (*["group f"] * 5, *[f"group {c}"] * 2, f"group {d}", "group h")
    assert source.groups == expected
    shards = split(source.groups, 4, seed=0, mode="seeded")
    assert [shards[source.digests.index(digest)] for digest in source.digests] == shards.tolist()

    unread = load_source(config(tmp_path / "x", group_column="family", check_images="none"))
    alone = {i: f"sample {i:06d}" for i in (1, 4, 5, 6, 7)}
    assert unread.groups == tuple(
        alone.get(i, f"group {family}") for i, family in enumerate(families)
    )


@given(
    st.lists(st.tuples(*[st.sampled_from([None, "a", "b", "c", "d"])] * 2), min_size=1),
    st.randoms(),
)
def test_groups_are_all_that_is_linked(marks, random):
    """Against the slow way: merge any two that share a mark until none do."""
    samples = {f"{i}": marks for i, marks in enumerate(marks)}
    sets = [{sample} for sample in samples]

    def linked(one, other):
        pairs = [(samples[a], samples[b]) for a in one for b in other]
        return any(x is not None and x == y for a, b in pairs for x, y in zip(a, b, strict=True))

    while pair := next((p for p in itertools.combinations(sets, 2) if linked(*p)), None):
        sets = [each for each in sets if each not in pair] + [pair[0] | pair[1]]
    expected = {}
    for each in sets:
        names, digests = ({samples[s][k] for s in each} - {None} for k in (0, 1))
        best = min(names or digests, default=None)
        expected |= dict.fromkeys(each, f"group {best}" if best else f"sample {min(each)}")
    order = random.sample(sorted(samples), len(samples))
    found = group(order, *([samples[s][k] for s in order] for k in (0, 1)))
    assert dict(zip(order, found, strict=True)) == expected
