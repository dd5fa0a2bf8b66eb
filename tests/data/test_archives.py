"""WebDataset archives against what was packed into them."""

import io
import json
import shutil
import tarfile

import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from iet_sd.data.captions import texts
from iet_sd.data.images import decode
from iet_sd.data.sources import load_source
from iet_sd.errors import UserError
from tests.data.conftest import picture


def encoded(number, format="PNG"):
    buffer = io.BytesIO()
    picture(number).save(buffer, format)
    return buffer.getvalue()


def pack(path, files):
    """An archive of these files, by name; a text or JSON is encoded."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            if isinstance(content, dict):
                content = json.dumps(content)
            if isinstance(content, str):
                content = content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def archives(tmp_path):
    """Two archives: captions in texts and JSON, images of several formats, one broken."""
    root = tmp_path / "archives"
    pack(
        root / "00000.tar",
        [
            ("0001.jpg", encoded(1, "JPEG")),
            ("0001.txt", "a cat\non a mat"),
            ("0002.png", encoded(2)),
            ("0002.json", {"text": ["a dog", "an animal"], "n": 3, "family": "dogs"}),
            ("readme", "not a sample"),
        ],
    )
    pack(
        root / "00001.tar",
        [
            ("sub/0003.v1.webp", encoded(3, "WEBP")),
            ("sub/0004.json", {"family": "none"}),
            ("sub/0004.webp", encoded(4, "WEBP")),
            ("sub/0004.txt", "the fourth"),
        ],
    )
    return root


def captions(source):
    return [texts(cell, "") for cell in source.dataset[:][source.caption_column]]


def error_of(settings):
    with pytest.raises(UserError) as error:
        load_source(settings)
    return str(error.value)


def test_samples_are_those_that_were_packed(archives, config):
    shutil.move(archives / "00001.tar", archives / "b.tar")
    pack(archives / "a.tar", [("0003.jpeg", encoded(3, "JPEG")), ("0003.caption", "third")])
    # Two extensions: the key ends at the first dot.
    pack(archives / "b.tar", [("x/4.jpg", encoded(4, "JPEG")), ("x/4.txt", "fourth")])
    source = load_source(config(archives))
    assert source.sample_ids == ("0001", "0002", "0003", "x/4")
    assert captions(source) == [["a cat on a mat"], ["a dog", "an animal"], ["third"], ["fourth"]]
    for row, (number, format) in zip(
        source.dataset, [(1, "JPEG"), (2, "PNG"), (3, "JPEG"), (4, "JPEG")], strict=True
    ):
        expected = Image.open(io.BytesIO(encoded(number, format)))
        assert decode(row["image"], "").tobytes() == expected.tobytes()


def test_one_archive_is_read_as_datasets_reads_it(config, tmp_path):
    files = [
        file for i in range(7) for file in [(f"{i}.png", encoded(i)), (f"{i}.txt", f"number {i}")]
    ]
    path = pack(tmp_path / "x" / "x.tar", files)
    source = load_source(config(path))
    theirs = load_dataset(
        "webdataset", data_files=str(path), split="train", cache_dir=str(tmp_path / "theirs")
    )
    assert source.sample_ids == tuple(theirs["__key__"])
    assert captions(source) == [[text] for text in theirs["txt"]]
    for row, image in zip(source.dataset, theirs["png"], strict=True):
        assert decode(row["image"], "").tobytes() == image.tobytes()


def test_names_in_the_way_of_datasets(archives, config):
    """Columns may be named as `load_dataset` names them."""
    shutil.rmtree(archives)
    pack(archives / "a.tar", [("1.jpg", encoded(1, "JPEG")), ("1.txt", "one")])
    source = load_source(config(archives, image_column="jpg", caption_column="txt"))
    assert captions(source) == [["one"]]


def test_columns_of_the_json(archives, config):
    settings = config(
        archives,
        repeats_column="n",
        group_column="family",
        on_missing_caption="empty",
        on_bad_image="skip",
    )
    source = load_source(settings)
    assert source.repeats == (1, 3, 1)
    assert source.groups == (f"group {source.digests[0]}", "group dogs", "group none")
    message = error_of(config(archives, group_column="famly"))
    assert "has 'famly'. They hold family, n, text" in message


def test_splits_by_name(archives, config):
    for path in archives.glob("*.tar"):
        path.unlink()
    pack(archives / "train-0.tar", [("1.png", encoded(1)), ("1.txt", "one")])
    pack(archives / "test-0.tar", [("2.png", encoded(2)), ("2.txt", "two")])
    assert captions(load_source(config(archives))) == [["one"]]
    assert captions(load_source(config(archives, dataset_split="test"))) == [["two"]]
    assert "has no such split" in error_of(config(archives, dataset_split="val"))


@pytest.mark.parametrize("beside", [["json"], ["parquet"], ["json", "parquet"]])
def test_archives_as_img2dataset_writes_them(beside, archives, config):
    """With a table of URLs and a JSON of counts beside each."""
    expected = load_source(config(archives, on_missing_caption="skip")).sample_ids
    for path in list(archives.glob("*.tar")):
        if "json" in beside:
            path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": 2}))
        if "parquet" in beside:
            rows = {"url": ["u"], "caption": ["a"], "key": ["0001"], "status": ["success"]}
            Dataset.from_dict(rows).to_parquet(path.with_suffix(".parquet"))
    assert load_source(config(archives, on_missing_caption="skip")).sample_ids == expected


def test_splits_by_the_card(archives, config):
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, name in [("train", "00001"), ("test", "00000")]:
        lines += [f"  - split: {split}", f"    path: {name}.tar"]
    (archives / "README.md").write_text("\n".join([*lines, "---", "# Cats"]))
    assert load_source(config(archives, on_missing_caption="skip")).sample_ids == ("sub/0004",)
    heldout = load_source(config(archives, dataset_split="test"))
    assert heldout.sample_ids == ("0001", "0002")


def test_archive_changed_between_two_runs(config, tmp_path):
    for number in (1, 2):
        path = pack(tmp_path / "a" / "a.tar", [("1.png", encoded(number)), ("1.txt", f"{number}")])
        source = load_source(config(path))
        assert captions(source) == [[str(number)]]
        assert decode(source.dataset[0]["image"], "").tobytes() == picture(number).tobytes()


def test_a_key_in_two_archives(config, tmp_path):
    for name in "ab":
        pack(tmp_path / "x" / f"{name}.tar", [("1.png", encoded(1)), ("1.txt", name)])
    assert load_source(config(tmp_path / "x")).sample_ids == ("1", "b.tar/1")


# Mistakes


def test_bad_members_are_named(archives, config):
    """A broken image, one that is missing, and captions that are, as in a folder."""
    cut = encoded(5)[:-200]
    pack(
        archives / "00002.tar",
        [("0005.png", cut), ("0005.txt", "five"), ("0006.txt", "six"), ("0007.jpg", "words")],
    )
    message = error_of(config(archives))
    assert "2 of 7 images have no caption: sub/0003, 0007." in message
    message = error_of(config(archives, on_missing_caption="empty"))
    assert "4 of 7 images cannot be read" in message
    assert "0005: image file is truncated" in message
    assert "0006: the row holds no image" in message
    assert "0007: not an image, or of an unknown format" in message
    assert "sub/0003: the row holds no image" in message
    source = load_source(config(archives, on_missing_caption="skip", on_bad_image="skip"))
    assert source.sample_ids == ("0001", "0002", "sub/0004")
    assert {name for name, _ in source.excluded} == {"sub/0003", "0005", "0006", "0007"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("1.json", "{")], "a.tar, sample 1: its .json is not valid JSON: "),
        ([("1.json", "[1]")], "a.tar, sample 1: its .json: expected {...}, got [1]"),
        (
            [("1.json", {"text": "a \ud83d cat"})],
            r"""is not UTF-8: ... '{"text": "a \ud83d cat"}' ... Write it whole""",
        ),
        ([("caf\udce9.png", "x")], r"a.tar: the name of sample b'caf\xe9' is not UTF-8."),
        ([("1.txt", b"\xff\xfe\x00")], "a.tar, sample 1: its .txt is not UTF-8 text"),
        ([("1.json", {"text": 3})], "a.tar, sample 1: a caption must be a text"),
        ([("1.jpg", "x"), ("1.png", "y")], "2 images, jpg, png: name one with --image_column"),
        ([("1.txt", "x"), ("2.txt", "y"), ("1.png", "z")], "do not lie together"),
        ([("1.json", {"caption": "a"})], "has 'text'. They hold caption; "),
    ],
)
def test_mistakes_in_an_archive(files, message, config, tmp_path):
    path = pack(tmp_path / "a" / "a.tar", files)
    assert message in error_of(config(path))


def test_of_several_images_one_is_named(config, tmp_path):
    files = [("1.jpg", "x"), ("1.png", encoded(1)), ("1.txt", "a")]
    source = load_source(config(pack(tmp_path / "a" / "a.tar", files), image_column="png"))
    assert decode(source.dataset[0]["png"], "").tobytes() == picture(1).tobytes()


@pytest.mark.parametrize("left", [100, 600, 1024, 1536 + 512])
def test_an_archive_that_is_cut_off_is_named(left, config, tmp_path):
    """Between two members as well, where tarfile is content."""
    files = [("1.txt", "a" * 500), ("2.txt", "b" * 500), ("3.txt", "c")]
    path = pack(tmp_path / "a" / "a.tar", files)
    path.write_bytes(path.read_bytes()[:left])
    message = error_of(config(path, on_missing_caption="empty"))
    assert "a.tar cannot be read" in message


def test_an_archive_that_is_none(config, tmp_path):
    (tmp_path / "a.tar").write_text("words")
    assert "a.tar cannot be read" in error_of(config(tmp_path / "a.tar"))
