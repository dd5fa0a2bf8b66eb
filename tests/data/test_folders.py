"""Sources: folders of images, what is wrong with some, and bad images."""

import json
import os
import shutil

import pytest
from datasets import Dataset
from PIL import Image

from iet_sd.data.images import decode
from iet_sd.data.sources import load_source
from tests.data.reading import captions, error_of


def test_folder_with_metadata(folder, config):
    root = folder(["b.png", "sub/a.png"])
    source = load_source(config(root))
    assert source.sample_ids == ("b.png", "sub/a.png")
    assert captions(source) == [["picture b.png"], ["picture sub/a.png"]]
    assert decode(source.dataset[1]["image"], "").tobytes() == (
        Image.open(root / "sub/a.png").tobytes()
    )
    assert source.excluded == ()


def test_metadata_csv(folder, config):
    root = folder(["a.png", "b.png"], rows=[])
    (root / "metadata.csv").write_text('file_name,caption\nb.png,"a cat, asleep"\na.png,b\n')
    source = load_source(config(root, caption_column="caption"))
    assert source.sample_ids == ("b.png", "a.png")
    assert captions(source) == [["a cat, asleep"], ["b"]]


def test_metadata_csv_with_commas_not_quoted(folder, config):
    root = folder(["a.png"], rows=[])
    (root / "metadata.csv").write_text("file_name,text\na.png,a cat, asleep\n")
    assert "Put quotes around" in error_of(config(root))


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        (['"a.png","a cat'], "row 1, read up to line 2: unexpected end of data."),
        (["a.png,a", 'b.png,"a cat', "c.png,c", ""], "row 2, read up to line 4: unexpected"),
        (["a.png,a", 'b.png,"b', 'c.png,"c"'], "row 2, read up to line 4: ',' expected"),
        (['a.png,"a', *["b.png,b"] * 20_000], ": field larger than field limit"),
    ],
)
def test_metadata_csv_with_a_quote_not_closed(folder, config, lines, where):
    root = folder(["a.png", "b.png", "c.png"], rows=[])
    (root / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    message = error_of(config(root, on_missing_caption="skip"))
    assert f"{root}/metadata.csv, row " in message
    assert where in message
    assert "Is a quote not closed?" in message


def test_metadata_parquet(folder, config):
    root = folder(["a.png"], rows=[])
    Dataset.from_dict({"file_name": ["a.png"], "text": ["a"]}).to_parquet(root / "metadata.parquet")
    assert captions(load_source(config(root))) == [["a"]]


def test_caption_with_odd_line_breaks(folder, config):
    root = folder(["a.png", "b.png"], rows=[])
    lines = [
        '{"file_name": "a.png", "text": "a\u2028b\x85c"}',
        '{"file_name": "b.png", "text": "b"}',
    ]
    (root / "metadata.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    assert captions(load_source(config(root))) == [["a\u2028b\x85c"], ["b"]]
    (root / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_text('file_name,text\na.png,"a\nb"\nb.png,b\n')
    assert captions(load_source(config(root))) == [["a\nb"], ["b"]]


def test_stray_archive_is_ignored(folder, config):
    root = folder(["a.png"])
    (root / "backup.zip").write_text("x")
    assert load_source(config(root)).sample_ids == ("a.png",)


def test_folder_as_img2dataset_writes_it(folder, config):
    """A table, its counts, and a JSON of each image beside images and captions."""
    root = folder(["00000/000000000.jpg", "00000/000000001.jpg"], rows=[])
    for path in root.glob("*/*.jpg"):
        path.with_suffix(".txt").write_text(f"caption {path.stem}")
        path.with_suffix(".json").write_text(json.dumps({"url": "u", "key": path.stem}))
    rows = {"url": ["u", "u"], "caption": ["a", "b"], "key": ["000000000", "000000001"]}
    Dataset.from_dict(rows).to_parquet(root / "00000.parquet")
    (root / "00000_stats.json").write_text(json.dumps({"count": 2}))
    source = load_source(config(root))
    assert source.sample_ids == ("00000/000000000.jpg", "00000/000000001.jpg")
    assert captions(source) == [["caption 000000000"], ["caption 000000001"]]


@pytest.mark.parametrize("name", ["labels.parquet", "labels.arrow"])
def test_stray_table_hides_no_images(folder, config, name):
    root = folder(["a.png"])
    with_bytes = Dataset.from_dict({"file_name": ["a.png"], "hash": [b"x"]})
    for rows in (with_bytes.remove_columns("hash"), with_bytes):
        if name.endswith(".parquet"):
            rows.to_parquet(root / name)
        else:
            rows.save_to_disk(root / "saved")
            shutil.move(root / "saved" / "data-00000-of-00001.arrow", root / name)
            shutil.rmtree(root / "saved")
        if rows is not with_bytes:
            assert captions(load_source(config(root))) == [["picture a.png"]]
    message = error_of(config(root))
    assert "Columns found: file_name, hash; for example --image_column hash." in message
    assert f"Tables are read, since {root / name} has images or bytes" in message
    (root / name).write_text("words")
    assert f"{root / name} cannot be read" in error_of(config(root))


def test_captions_as_lists_and_strings(folder, config):
    rows = [{"file_name": "a.png", "text": ["one", "", "two"]}, {"file_name": "b.png", "text": "b"}]
    source = load_source(config(folder(["a.png", "b.png"], rows)))
    assert captions(source) == [["one", "two"], ["b"]]


def test_sidecars_in_nested_folders(folder, config):
    root = folder(["10_cat/a.png", "10_cat/b.jpg", "c.png"], rows=[])
    (root / "10_cat/a.txt").write_text("a cat\non a mat\n")
    (root / "10_cat/b.caption").write_text("\ufeffnaïve cat", encoding="utf-8")
    (root / "c.txt").write_text("c")
    source = load_source(config(root))
    assert source.sample_ids == ("10_cat/a.png", "10_cat/b.jpg", "c.png")
    assert captions(source) == [["a cat on a mat"], ["naïve cat"], ["c"]]


def test_sidecar_fills_in_for_metadata(folder, config):
    root = folder(["a.png", "b.png"], rows=[{"file_name": "b.png", "text": "b"}])
    (root / "a.txt").write_text("a")
    assert captions(load_source(config(root))) == [["b"], ["a"]]


def test_hidden_files_are_no_images(folder, config):
    root = folder(["a.png", "._a.png", ".trash/b.png"], rows=[{"file_name": "a.png", "text": "a"}])
    assert load_source(config(root)).sample_ids == ("a.png",)


def test_link_that_leads_back(folder, config):
    """One alone: each more would multiply what is found, if it were followed."""
    root = folder(["a.png", "sub/b.png"], rows=[])
    (root / "sub" / "again").symlink_to(root)
    (root / "gone").symlink_to("nowhere")
    found = load_source(config(root, on_missing_caption="empty")).sample_ids
    assert found == ("a.png", "sub/b.png")


def test_folder_that_links_lead_to_is_read_once(folder, config):
    """Where it lies, else by the link that is first."""
    root = folder(["z/a.png", "z/y/b.png", ".hidden/c.png"], rows=[])
    elsewhere = folder(["d.png", "in/e.png"], rows=[], at="elsewhere")
    (root / "a").symlink_to(root / "z" / "y")
    (root / "shown").symlink_to(".hidden")
    (root / "linked").symlink_to(elsewhere)
    (root / "twice").symlink_to(elsewhere)
    found = load_source(config(root, on_missing_caption="empty")).sample_ids
    assert found == ("linked/d.png", "linked/in/e.png", "shown/c.png", "z/a.png", "z/y/b.png")


def test_metadata_column_named_sample_id(folder, config):
    rows = [{"file_name": n, "text": n, "sample_id": i} for i, n in enumerate(["a.png", "b.png"])]
    source = load_source(config(folder(["a.png", "b.png"], rows)))
    assert source.sample_ids == ("0", "1")


def test_folder_changed_between_two_runs(folder, config):
    root = folder(["a.png"])
    load_source(config(root))
    folder(["a.png", "b.png"], [{"file_name": n, "text": "new"} for n in ("a.png", "b.png")])
    assert captions(load_source(config(root))) == [["new"], ["new"]]


def test_metadata_columns_may_mix_types(folder, config):
    rows = [{"file_name": n, "text": n, "age": age} for n, age in [("a.png", 1), ("b.png", "x")]]
    assert load_source(config(folder(["a.png", "b.png"], rows), group_column="age")).groups == (
        "group 1",
        "group x",
    )


# Mistakes in folders


def test_no_such_folder(config, tmp_path):
    assert "no such folder" in error_of(config(tmp_path / "nowhere"))


def test_empty_folder(config, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no images" in error_of(config(tmp_path / "empty"))


def test_tables_that_hold_no_images(config, tmp_path):
    Dataset.from_dict({"url": ["u"], "caption": ["a"]}).to_parquet(tmp_path / "00000.parquet")
    assert "holds no images" in (message := error_of(config(tmp_path)))
    assert "00000.parquet has no column of images, only url, caption." in message


def test_wrong_kind_of_file(config, tmp_path):
    (tmp_path / "x.docx").write_text("x")
    assert "a folder, a .parquet file or a .tar archive" in error_of(config(tmp_path / "x.docx"))


def test_images_without_captions(folder, config):
    root = folder(rows=[])
    message = error_of(config(root))
    assert "metadata.jsonl" in message
    assert "cat.txt" in message
    assert captions(load_source(config(root, on_missing_caption="empty"))) == [[], [], []]


def test_caption_column_of_the_wrong_name(folder, config):
    root = folder(["a.png"], [{"file_name": "a.png", "age": 3, "caption": "a"}])
    message = error_of(config(root))
    assert "'text'" in message
    assert "age, caption" in message
    assert "--caption_column caption" in message


@pytest.mark.parametrize("text", [None, "", "  ", [], [""]])
def test_missing_caption(folder, config, text):
    rows = [{"file_name": "a.png", "text": text}, {"file_name": "b.png", "text": "b"}]
    # c.png has no row at all
    root = folder(["a.png", "b.png", "c.png"], rows)
    message = error_of(config(root))
    assert "2 of 3 images have no caption: a.png, c.png." in message
    skipping = load_source(config(root, on_missing_caption="skip"))
    assert skipping.sample_ids == ("b.png",)
    assert skipping.excluded == (("a.png", "no caption"), ("c.png", "no caption"))
    empty = load_source(config(root, on_missing_caption="empty"))
    assert dict(zip(empty.sample_ids, captions(empty), strict=True)) == {
        "a.png": [],
        "b.png": ["b"],
        "c.png": [],
    }


def test_caption_that_is_no_text(folder, config):
    root = folder(["a.png"], [{"file_name": "a.png", "text": 3}])
    assert "a.png: a caption must be a text or a list of texts; got 3" in error_of(config(root))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "row 2 has no file_name"),
        ('{"file_name": "a.png", "text"', "line 2 is not valid JSON"),
        ('["a.png", "a"]', "line 2: expected {...}"),
        (r'{"file_name": "b.png", "text": "a \ud83d cat"}', r"line 2 holds half a character"),
        (r'{"file_name": "b.png", "tags": ["\udce9"]}', r""""tags": ["\udce9"]}' ... Write"""),
        ('{"file_name": "b.png", "n": 1' + "0" * 5000 + "}", "line 2 is not valid JSON: Exceeds"),
        ('{"file_name": "../b.png", "text": "b"}', "file_name must lead to a file in"),
        ('{"file_name": "./a.png", "text": "b"}', "'./a.png' has a row already"),
    ],
)
def test_bad_row_of_metadata(folder, config, line, message):
    root = folder(["a.png"])
    with (root / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    assert message in error_of(config(root))


def test_image_whose_name_is_not_utf8(folder, config):
    root = folder(["a.png"])
    try:
        shutil.copy(root / "a.png", os.path.join(os.fsencode(root), b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system holds UTF-8 alone")
    message = error_of(config(root, on_missing_caption="empty"))
    assert "1 of 2 images have a path that is not UTF-8" in message
    assert r"/images/caf\xe9.png'. Rename them" in message


def test_sidecar_that_is_no_text(folder, config):
    root = folder(["a.png"], rows=[])
    (root / "a.txt").write_bytes(b"\xff\xfe\x00")
    message = error_of(config(root))
    assert "a.txt" in message
    assert "UTF-8" in message


# Bad images


@pytest.fixture
def odd_folder(folder):
    """Good: palette.png, cmyk.jpg, rgba.png, turned.jpg. Bad: cut.jpg, words.png, gone.png."""
    names = ["palette.png", "cmyk.jpg", "rgba.png", "turned.jpg", "cut.jpg", "words.png"]
    root = folder(names, [{"file_name": n, "text": n} for n in [*names, "gone.png"]])
    picture = Image.open(root / "rgba.png").convert("RGB")
    picture.quantize(8).save(root / "palette.png")
    picture.convert("CMYK").save(root / "cmyk.jpg")
    picture.convert("RGBA").save(root / "rgba.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "turned.jpg", exif=exif)
    content = (root / "cut.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(content[:-100])
    (root / "words.png").write_text("not a picture")
    return root


def test_bad_images_are_named(odd_folder, config):
    message = error_of(config(odd_folder))
    assert "3 of 7 images cannot be read" in message
    assert "cut.jpg: image file is truncated" in message
    assert "words.png: not an image" in message
    assert "gone.png: no such file" in message
    assert "--on_bad_image skip" in message


def test_bad_images_are_skipped(odd_folder, config):
    source = load_source(config(odd_folder, on_bad_image="skip"))
    assert source.sample_ids == ("palette.png", "cmyk.jpg", "rgba.png", "turned.jpg")
    assert [name for name, _ in source.excluded] == ["cut.jpg", "words.png", "gone.png"]
    sizes = [decode(row["image"], "x").size for row in source.dataset]
    assert sizes == [(20, 16), (20, 16), (20, 16), (16, 20)]
    assert captions(source) == [[name] for name in source.sample_ids]


def test_images_are_not_checked_unless_asked(odd_folder, config):
    assert len(load_source(config(odd_folder, check_images="none")).sample_ids) == 7


def test_nothing_left(folder, config):
    root = folder(["a.png"])
    (root / "a.png").write_text("words")
    assert "Nothing to train on" in error_of(config(root, on_bad_image="skip"))


def test_many_bad_images_are_counted(folder, config):
    root = folder([f"{i}.png" for i in range(8)])
    for path in root.glob("*.png"):
        path.write_text("words")
    message = error_of(config(root))
    assert "8 of 8" in message
    assert "and 3 more" in message
