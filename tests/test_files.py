import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from iet_sd import files
from iet_sd.errors import UserError
from iet_sd.files import (
    atomic_file,
    atomic_folder,
    check_writable,
    free_bytes,
    new_staging,
    publish,
    remove_leftovers,
    staging_for,
    write_text_atomic,
)

ROOT = Path(__file__).parent.parent


def content(folder):
    """Every file under a folder with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(folder, **texts):
    for name, text in texts.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def save(path, version):
    with atomic_folder(path) as staging:
        write(staging / "unet", weights=version)
        write(staging, index=version)


def test_new_folder_appears_whole_and_only_at_the_end(tmp_path):
    target = tmp_path / "deep" / "result"
    with atomic_folder(target) as staging:
        write(staging, index="1")
        assert not target.exists()
    assert content(tmp_path) == {"deep/result/index": "1"}


def test_merge_replaces_entries_as_a_whole_and_keeps_others(tmp_path):
    write(tmp_path / "logs", events="e")
    write(tmp_path / "unet", weights="old", stale="old")
    write(tmp_path, index="old", metrics="m")
    save(tmp_path, "new")
    assert content(tmp_path) == {
        "logs/events": "e",
        "unet/weights": "new",
        "index": "new",
        "metrics": "m",
    }
    assert sorted(os.listdir(tmp_path)) == ["index", "logs", "metrics", "unet"]


@pytest.mark.parametrize("exists", [False, True])
def test_crash_while_writing_changes_nothing(tmp_path, exists):
    target = tmp_path / "result"
    if exists:
        save(target, "old")
    before = content(tmp_path)

    def interrupted():
        with atomic_folder(target) as staging:
            write(staging / "unet", weights="half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path) == before
    assert target.exists() == exists


def test_crash_between_the_two_renames_of_a_folder_brings_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "result"
    save(target, "old")
    rename = os.rename

    def fail_on_new(source, destination):
        if "retired" not in str(source) + str(destination):
            raise OSError("disk gone")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", fail_on_new)
    with pytest.raises(OSError, match="disk gone"):
        save(target, "new")
    assert content(tmp_path) == {"result/unet/weights": "old", "result/index": "old"}


def test_leftovers_of_a_killed_run_do_not_reach_the_result(tmp_path):
    write(tmp_path / ".result.partial", half="x")
    save(tmp_path / "result", "1")
    write(tmp_path / "result" / ".partial", half="x")
    save(tmp_path / "result", "2")
    assert content(tmp_path) == {"result/unet/weights": "2", "result/index": "2"}


def test_several_can_write_between_the_two_halves(tmp_path):
    target = tmp_path / "result"
    write(new_staging(target), index="main")
    write(staging_for(target), other="another process")
    publish(target)
    assert content(tmp_path) == {"result/index": "main", "result/other": "another process"}


def test_index_comes_after_the_parts_it_names(tmp_path):
    # The folder "unet" cannot take the place of a file: the save fails, and the index stays old.
    write(tmp_path, unet="a file", index="old")
    with pytest.raises(OSError, match="unet"):
        save(tmp_path, "new")
    assert content(tmp_path) == {"unet": "a file", "index": "old"}


def test_text_is_replaced_or_left(tmp_path):
    path = tmp_path / "config.yaml"
    write_text_atomic(path, "naïve\n")
    assert path.read_text(encoding="utf-8") == "naïve\n"
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "long enough to be flushed " * 1000 + "\ud800")
    assert content(tmp_path) == {"config.yaml": "naïve\n"}


# Each waits for the other to be there, and then writes the text it is given.
WRITING = """
import sys
from pathlib import Path
from iet_sd.files import write_text_atomic
path, mine, other = map(Path, sys.argv[1:])
mine.touch()
while not other.exists():
    pass
for _ in range(100):
    write_text_atomic(path, mine.name * 1000)
"""


def test_processes_that_write_one_text_do_not_disturb_each_other(tmp_path):
    path, *names = (tmp_path / name for name in ("index.json", "a", "b"))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITING, path, *order], cwd=ROOT, stderr=subprocess.PIPE
        )
        for order in (names, reversed(names))
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=60)
        assert writer.returncode == 0, said.decode()
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "index.json"]


def test_writers_of_one_process_do_not_disturb_each_other(tmp_path):
    """Nor those of containers, where the first process is number 1 in each."""
    path = tmp_path / "file"
    with atomic_file(path) as first:
        first.write(b"first")
        with atomic_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_what_killed_writers_left_goes_away_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda _: 1 / 0)
    monkeypatch.setattr(files.Path, "unlink", lambda *_, **__: None)
    with pytest.raises(ZeroDivisionError):
        write_text_atomic(tmp_path / "metrics.jsonl", "half")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    write(tmp_path, **{".download.partial": "another program's", "config.yaml": "whole"})
    write(tmp_path / ".partial", index="half of a folder")
    remove_leftovers(tmp_path)
    assert not left.exists()
    assert sorted(os.listdir(tmp_path)) == [".download.partial", ".partial", "config.yaml"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_all_files_have_the_rights_of_the_umask(mask, expected, tmp_path):
    before = os.umask(mask)
    try:
        for _ in range(2):  # as a new folder, and merged into one
            with atomic_folder(tmp_path / "result") as staging:
                write(staging / "unet", config="c")
                save_file({}, staging / "unet" / "weights.safetensors")
    finally:
        os.umask(before)
    found = [p for p in (tmp_path / "result").rglob("*") if p.is_file()]
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in found} == {
        "config": expected,
        "weights.safetensors": expected,
    }


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "file is a file; give a folder."),
        ("file/x", "file/x cannot be written to: Not a directory. Give a folder"),
        ("n" * 300, "nnn cannot be written to: File name too long. Give a folder"),
        *[
            pytest.param(
                place,
                f"--flag {place} cannot be written to: ",
                marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux's own folders"),
            )
            for place in ("/proc", "/proc/iet", "/sys", "/sys/iet")
        ],
    ],
    ids=lambda text: text[:9],
)
def test_where_nothing_can_be_written_is_one_error_with_the_reason(place, said, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as error:
        check_writable(tmp_path / place, "--flag")
    assert said in str(error.value)
    assert str(error.value).startswith("--flag ")
    assert content(tmp_path) == {"file": "mine"}


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "deep" / "result")
    assert not any((tmp_path / "deep" / "result").iterdir())


def test_free_bytes_are_those_of_the_disk_where_the_folder_would_be(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert free_bytes(tmp_path / "deep" / "cache") == pytest.approx(free, rel=0.05)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "Not a directory"),
        ("file/x", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("link/x", "No such file"),
        pytest.param(
            "/proc/iet",
            "No such file",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux's own folder"),
        ),
    ],
    ids=lambda text: text[:9],
)
def test_where_nothing_can_be_written_no_bytes_are_free(place, said, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=said):
        free_bytes(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
