"""Sources: tables, names, repeats, and the Hub."""

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from PIL import Image

from iet_sd.data.sources import load_source
from tests.data.reading import captions, error_of, png, reds, table

# Tables


def test_parquet_file(config, tmp_path):
    table().to_parquet(tmp_path / "x.parquet")
    source = load_source(config(tmp_path / "x.parquet"))
    assert source.sample_ids == ("000000", "000001", "000002")
    assert reds(source) == [0, 1, 2]
    assert captions(source) == [["number 0"], ["number 1"], ["number 2"]]


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_folder_of_parquet_files_with_splits(config, tmp_path, flag):
    root = tmp_path / "tables"
    root.mkdir()
    (root / "LICENSE").write_text("free")
    (root / "LICENSE.txt").write_text("free")
    table(2).to_parquet(root / "train-00000-of-00002.parquet")
    table(1, first=2).to_parquet(root / "train-00001-of-00002.parquet")
    table(2, first=7).to_parquet(root / "test-00000-of-00001.parquet")

    def settings(split):
        if flag == "train_data_dir":
            return config(root, dataset_split=split)
        return type(config(root))(
            dataset_name=str(root), cache_dir=str(tmp_path / "cache"), dataset_split=split
        )

    assert reds(load_source(settings("train"))) == [0, 1, 2]
    assert reds(load_source(settings("test"))) == [7, 8]
    assert "['train', 'test']" in error_of(settings("held-out"))


def test_tables_with_images_among_other_files(config, tmp_path):
    """However many there are of these, and of tables that hold none."""
    root = tmp_path / "tables"
    root.mkdir()
    table(2).to_parquet(root / "data.parquet")
    Dataset.from_dict({"url": ["u"], "status": ["success"]}).to_parquet(root / "urls.parquet")
    for number in range(3):
        (root / f"{number}_stats.json").write_text('{"count": 2}')
        (root / f"{number}.png").write_bytes(png(7)["bytes"])
    assert reds(load_source(config(root))) == [0, 1]
    table(1, first=5).to_parquet(root / "test.parquet")
    (root / "data.parquet").rename(root / "train.parquet")
    assert reds(load_source(config(root))) == [0, 1]
    assert reds(load_source(config(root, dataset_split="test"))) == [5]


def test_parquet_file_changed_between_two_runs(config, tmp_path):
    for place, shown in [(tmp_path / "one", tmp_path / "one/x.parquet"), (tmp_path / "two",) * 2]:
        place.mkdir()
        table(2).to_parquet(place / "x.parquet")
        assert reds(load_source(config(shown))) == [0, 1]
        table(3, first=5).to_parquet(place / "x.parquet")
        assert reds(load_source(config(shown))) == [5, 6, 7]


def test_broken_parquet_file(config, tmp_path):
    (tmp_path / "x.parquet").write_text("words")
    assert "x.parquet cannot be read as a data set: " in error_of(config(tmp_path / "x.parquet"))


@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_columns_that_are_images_without_saying_so(config, tmp_path, kind):
    cells = [png(i) if kind == "file" else png(i)["bytes"] for i in range(2)]
    Dataset.from_dict({"image": cells, "text": ["a", "b"]}).to_parquet(tmp_path / "x.parquet")
    assert reds(load_source(config(tmp_path / "x.parquet"))) == [0, 1]


def test_folder_with_configurations(config, tmp_path):
    root = tmp_path / "tables"
    lines = ["---", "configs:"]
    for number, name in enumerate(["small", "large"]):
        (root / name).mkdir(parents=True)
        table(2, first=2 * number).to_parquet(root / name / "x.parquet")
        lines += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (root / "README.md").write_text("\n".join([*lines, "---"]))
    assert reds(load_source(config(root, dataset_config_name="large"))) == [2, 3]
    message = error_of(config(root))
    assert "['small', 'large']" in message
    assert "--dataset_config_name" in message


def test_saved_dataset(config, tmp_path):
    table(3).save_to_disk(tmp_path / "one")
    assert reds(load_source(config(tmp_path / "one"))) == [0, 1, 2]
    splits = {"train": table(1), "test": table(2, first=4)}
    DatasetDict(splits).save_to_disk(tmp_path / "splits")
    assert reds(load_source(config(tmp_path / "splits", dataset_split="test"))) == [4, 5]
    assert "['train', 'test']" in error_of(config(tmp_path / "splits", dataset_split="val"))


def test_captions_in_lists(config, tmp_path):
    features = Features({"image": datasets.Image(), "text": List(Value("string"))})
    content = {"image": [png(0), png(1)], "text": [["a", "b"], ["c"]]}
    Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "x")
    assert captions(load_source(config(tmp_path / "x"))) == [["a", "b"], ["c"]]


def test_column_that_does_not_exist(config, tmp_path):
    table().rename_columns({"text": "caption", "image": "picture"}).save_to_disk(tmp_path / "x")
    message = error_of(config(tmp_path / "x"))
    assert "'image' does not exist" in message
    assert "picture, caption" in message
    assert "--image_column picture" in message
    message = error_of(config(tmp_path / "x", image_column="picture"))
    assert "--caption_column caption" in message
    message = error_of(config(tmp_path / "x", image_column="caption"))
    assert "not images" in message
    found = load_source(config(tmp_path / "x", image_column="picture", caption_column="caption"))
    assert reds(found) == [0, 1, 2]


def test_no_column_of_captions(config, tmp_path):
    table(label=[0, 1, 1]).remove_columns("text").save_to_disk(tmp_path / "x")
    message = error_of(config(tmp_path / "x"))
    assert "image, label" in message
    assert "none holds texts" in message


def test_row_without_an_image(config, tmp_path):
    features = Features({"image": datasets.Image(), "text": Value("string")})
    content = {"image": [png(0), None], "text": ["a", "b"]}
    Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "x")
    assert "000001: the row holds no image" in error_of(config(tmp_path / "x"))


# Names, number of samples


def test_sample_ids(config, tmp_path):
    table(sample_id=["x", "y", "z"], key=[5, 6, 7], twice=["a", "a", "b"]).save_to_disk(
        tmp_path / "x"
    )
    assert load_source(config(tmp_path / "x")).sample_ids == ("x", "y", "z")
    by_key = load_source(config(tmp_path / "x", sample_id_column="key"))
    assert by_key.sample_ids == ("5", "6", "7")
    message = error_of(config(tmp_path / "x", sample_id_column="twice"))
    assert "more than one row has a." in message
    assert "sample_id, key" in error_of(config(tmp_path / "x", sample_id_column="nothing"))


BY_CHANCE = {
    "left empty": (["x", None, "z"], "names only 2 of 3"),
    "twice the same": (["x", "y", "x"], "more than one row has x."),
    "no names": ([1.0, 2.0, 3.0], "holds Value('float64'), not names."),
}


@pytest.mark.parametrize(("values", "why"), BY_CHANCE.values(), ids=BY_CHANCE)
def test_sample_id_that_names_no_samples(config, tmp_path, caplog, values, why):
    """It is an error only where it was asked for, and however many samples are taken."""
    table(sample_id=values).save_to_disk(tmp_path / "x")
    for count in (None, 1):
        caplog.clear()
        source = load_source(config(tmp_path / "x", max_train_samples=count))
        assert source.sample_ids == ("000000", "000001", "000002")[:count]
        [line] = caplog.messages
        assert why in line
        assert "Samples are named by their positions" in line
    message = error_of(config(tmp_path / "x", sample_id_column="sample_id"))
    assert why.removesuffix(".") in message
    assert "--sample_id_column" in message


def test_sample_id_of_a_folder_that_names_no_images(folder, config, caplog):
    rows = [{"file_name": n, "text": n, "sample_id": "x"} for n in ("a.png", "b.png")]
    root = folder(["a.png", "b.png"], rows)
    assert load_source(config(root)).sample_ids == ("a.png", "b.png")
    [line] = caplog.messages
    assert "more than one row has x. Images are named by their paths" in line
    assert "more than one row has x." in error_of(config(root, sample_id_column="sample_id"))


def test_position_names_survive_a_skip(config, tmp_path):
    table(text=["a", "", "c"]).save_to_disk(tmp_path / "x")
    source = load_source(config(tmp_path / "x", on_missing_caption="skip"))
    assert source.sample_ids == ("000000", "000002")
    assert reds(source) == [0, 2]


def test_without_checks_no_image_is_read(folder, config):
    """Nothing is known of them then; what each sample is called still is."""
    root = folder(["a.png", "b.png"])
    for path in root.glob("*.png"):
        path.write_bytes(b"")
    source = load_source(config(root, check_images="none"))
    assert source.sample_ids == ("a.png", "b.png")
    assert source.groups == ("sample a.png", "sample b.png")
    assert source.digests == (None, None)


def test_max_train_samples(config, tmp_path):
    table(5).save_to_disk(tmp_path / "x")
    assert reds(load_source(config(tmp_path / "x", max_train_samples=2))) == [0, 1]
    assert len(load_source(config(tmp_path / "x", max_train_samples=9)).dataset) == 5


# Repeats


def test_repeats(folder, config):
    rows = [
        {"file_name": "a.png", "text": "a", "n": 3},
        {"file_name": "b.png", "text": "b", "n": "2"},
        {"file_name": "c.png", "text": "c"},
    ]
    source = load_source(config(folder(rows=rows), repeats_column="n"))
    assert source.repeats == (3, 2, 1)
    assert source.repeated([2, 0]) == [2, 0, 0, 0]
    assert load_source(config(folder(rows=rows))).repeats == (1, 1, 1)


def test_repeats_of_a_table(config, tmp_path):
    table(n=[1, None, 4]).save_to_disk(tmp_path / "x")
    assert load_source(config(tmp_path / "x", repeats_column="n")).repeats == (1, 1, 4)
    message = error_of(config(tmp_path / "x", repeats_column="m"))
    assert "--repeats_column: column 'm' does not exist" in message


@pytest.mark.parametrize("value", [0, -1, "1.5", "often", 2.0])
def test_repeats_that_are_no_number(folder, config, value):
    rows = [{"file_name": "a.png", "text": "a", "n": value}]
    message = error_of(config(folder(["a.png"], rows), repeats_column="n"))
    assert f"a.png: --repeats_column n must hold a whole number of 1 or more; got '{value}'" in (
        message
    )


def test_visits_of_an_epoch(folder, config):
    """A sample counts as often as it repeats, a batch that a size does not fill as a whole one."""
    names = [f"{i}.png" for i in range(5)]
    rows = [{"file_name": name, "text": "a", "n": 1 + (name == "0.png")} for name in names]
    root = folder(names, rows)
    Image.new("RGB", (8, 16)).save(root / "4.png")
    square = load_source(config(root, repeats_column="n"))
    shards = torch.tensor([0, 0, 1, -1, 1])
    assert square.visits_per_epoch(shards, 2) == 5
    several = load_source(config(root, repeats_column="n", aspect_ratio_buckets="8,8;16,8"))
    # Of 3 visits of one size 3, since batches go on; of two sizes, a batch each.
    assert several.visits_per_epoch(shards, 2) == 3 + 2 + 2


def test_fingerprint_tells_repeats(folder, config):
    rows = [{"file_name": "a.png", "text": "a", "n": 2}]
    root = folder(["a.png"], rows)
    prints = [load_source(config(root, repeats_column=n)).fingerprint() for n in ("n", None)]
    assert prints[0] != prints[1]


# The Hub


def test_name_that_is_not_on_the_hub(config, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    make = type(config(tmp_path))
    message = error_of(make(dataset_name="nobody/nothing", cache_dir=str(tmp_path)))
    assert "no such folder here, and the Hub answered: " in message
    assert "nobody/nothing" in message
    assert "no such folder" in error_of(make(dataset_name="./some/where"))


def test_local_reading_is_silent(config, tmp_path, capfd):
    table().to_parquet(tmp_path / "x.parquet")
    capfd.readouterr()
    load_source(config(tmp_path / "x.parquet"))
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()
