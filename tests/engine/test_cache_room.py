"""What is not kept since the disk has no room for it, or cannot be written to."""

import errno
import os
import shutil

import pytest

from iet_sd import files
from iet_sd.data import cache
from iet_sd.data.latents import Texts
from iet_sd.data.sources import load_source
from iet_sd.engine import caching
from iet_sd.engine.beforehand import choose
from iet_sd.engine.caching import fit
from iet_sd.engine.sizes import meta_components
from iet_sd.errors import UserError
from tests.engine.preparing import FITTING, prepare, tables


@pytest.fixture
def free(monkeypatch):
    """Have a disk of so many free bytes, as far as anyone asks."""

    def make(size):
        usage = shutil.disk_usage(".")._replace(free=size)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)

    return make


def planned(config):
    return choose(config, load_source(config.data), 10**6)


def told(config):
    """What a dry run says."""
    beforehand = planned(config)
    parts = meta_components(config.model, config.data.cache_dir)
    return beforehand.without(fit(config, parts, beforehand)[1]).describe()


@pytest.mark.parametrize(
    ("of", "kept"),
    [
        (["images"], []),
        (["captions"], ["latents"]),  # which are smaller
        (["captions", "images"], ["texts"]),  # which come first
        (None, ["latents", "texts"]),
    ],
    ids=lambda names: " and ".join(names or ["none"]),
)
def test_auto_keeps_what_half_of_the_free_space_has_room_for(
    of, kept, settings, tmp_path, free, caplog
):
    """A byte less of it than these take, or all that is needed."""
    caplog.set_level("INFO")
    config = settings(cache="auto", **FITTING)
    sizes = planned(config).sizes(config)
    free(2 * (sum(sizes[what] for what in of) - 1 if of else sum(sizes.values())))
    said = told(config)
    assert not (tmp_path / "cache").exists()
    _, _, dataset = prepare(config)
    assert isinstance(dataset.read, Texts) == ("texts" in kept)
    assert (dataset.latents is not None) == ("latents" in kept)
    assert kept == ([path.name.split("-")[0] for path in tables(tmp_path)] if kept else [])
    assert said in caplog.text
    for what, kind in (("captions", "texts"), ("images", "latents")):
        place = tmp_path / "cache" / "iet_sd" / kind
        assert (f"; {what} are encoded in every visit: {place}-" in f"; {said}") == (
            kind not in kept
        )
    assert ("half of that is left for checkpoints" in said) == (len(kept) < 2)


def test_what_is_already_there_takes_no_more_room(settings, tmp_path, free, monkeypatch):
    """Of a build that was stopped the rest counts, and of one that is through nothing."""
    monkeypatch.setattr("iet_sd.data.cache.ROWS", 4)
    config = settings(cache="auto", **FITTING)
    sizes = planned(config).sizes(config)
    prepare(config)
    latents, _ = tables(tmp_path)
    for path in sorted(latents.glob("*.safetensors"))[1:]:
        path.unlink()
    rest = sizes["images"] * 3 // 4
    free(2 * rest - 2)
    assert "; images are encoded in every visit" in told(config)
    free(2 * rest)
    assert "every visit" not in told(config)
    _, _, dataset = prepare(config)
    assert not dataset.latents.table.missing()
    free(0)
    assert "every visit" not in told(config)


def test_on_takes_all_that_is_free_or_says_what_is_lacking(settings, tmp_path, free):
    config = settings(cache="on", **FITTING)
    need = sum(planned(config).sizes(config).values())
    free(need - 1)
    with pytest.raises(UserError, match=r"--cache on: .* images, as .* has room for") as error:
        prepare(config)
    words = [str(tmp_path / "cache"), "GiB are to be written", "--cache_dir", "auto", "--cache off"]
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "cache").exists()
    free(need)
    prepare(config)


@pytest.mark.parametrize("place", ["file", "n" * 300], ids=["a file", "a long name"])
def test_where_nothing_can_be_written_auto_keeps_nothing(place, settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    given = FITTING | {"cache_dir": str(tmp_path / place)}
    _, _, dataset = prepare(settings(cache="auto", **given))
    assert not isinstance(dataset.read, Texts)
    assert dataset.latents is None
    assert "cannot be written to" in told(settings(cache="auto", **given))
    with pytest.raises(UserError, match=r"--cache on: .* cannot be written to: .*--cache off"):
        prepare(settings(cache="on", **given))


def test_a_default_folder_that_cannot_be_written_to_stops_no_run(settings, tmp_path, monkeypatch):
    """Nobody has asked for a cache, nor named a folder."""
    (tmp_path / "file").write_text("mine")
    home = str(tmp_path / "file" / "home")
    monkeypatch.setattr(cache.huggingface_hub.constants, "HF_HOME", home)
    config = settings(cache="auto", cache_dir=None, **FITTING)
    _, _, dataset = prepare(config)
    assert dataset.latents is None
    said = told(config)
    assert "captions are encoded in every visit: " in said
    assert home in said
    assert "--cache_dir" not in said


def test_weights_that_are_yet_to_come_have_made_no_table(settings, tmp_path, pipelines):
    """As in a dry run, which fetches none."""
    bare = tmp_path / "bare"
    shutil.copytree(pipelines["sd1"], bare)
    config = settings(pretrained_model_name_or_path=str(bare), cache="auto", **FITTING)
    parts, beforehand = meta_components(config.model, None), planned(config)
    for path in bare.rglob("*.safetensors"):
        path.unlink()
    kept, reasons = fit(config, parts, beforehand)
    assert not reasons
    sizes = beforehand.sizes(settings(cache="auto", **FITTING))
    assert {what: need for what, (_, need) in kept.items()} == sizes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_a_disk_that_others_fill_meanwhile_is_named(number, settings, tmp_path, monkeypatch):
    config = settings(cache="auto", **FITTING)

    def full(path):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as context:
        context.setattr(cache, "atomic_file", full)
        with pytest.raises(UserError, match=os.strerror(number)) as error:
            prepare(config)
    words = [str(tmp_path / "cache" / "iet_sd" / "texts-"), "GiB were missing", "--cache_dir"]
    words += ["--cache off", "make room", "goes on"]
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
    prepare(config)


def test_what_is_kept_is_settled_by_the_first_process(settings, monkeypatch):
    """Who looks a moment later may find another disk."""
    asked = []

    def from_main(function, process_index, num_processes):
        asked.append((process_index, num_processes))
        return {}, {"captions": "of the first process", "images": "of the first process"}

    monkeypatch.setattr(caching, "from_main", from_main)
    config = settings(cache="auto", **FITTING)
    components, _, dataset = prepare(config, processes=(1, 2))
    assert asked == [(1, 2)]
    assert dataset.latents is None
    assert dataset.read == components.tokenize
