"""Cells of the efficacy study on a tiny pipeline: readings, resuming, and the runner."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.efficacy import results, runner, settings, study
from benchmarks.efficacy.methods import METHODS, Method
from benchmarks.efficacy.protocol import ROOT, Protocol
from benchmarks.efficacy.study import Cell
from iet_sd.config import DataConfig
from iet_sd.data.sources import load_source


@pytest.fixture(scope="session")
def protocol(pipelines):
    return Protocol(
        model=str(pipelines["sd1"]),
        resolution=32,
        images=12,
        heldout=8,
        duplicated=2,
        copies=3,
        batch_size=4,
        updates=16,
        rounds=4,
        aggregate_every=2,
        warmup=1,
        prompts=6,
        samples=6,
        timesteps=2,
        inference_steps=2,
        shown=6,
    )


PLUS = Cell("fluent", "full", "iet_agc_plus", 1e-3, 0, 2)


def run(cell, protocol, work, folder):
    """A cell by its own command; returns its exit status."""
    work.mkdir(parents=True, exist_ok=True)
    running = runner.start(cell, protocol, work, folder)
    return running.process.wait(120)


@pytest.fixture(scope="session")
def duplicated(protocol, tmp_path_factory):
    """A cell that ran through, by its own process: its result, and what is left of its work."""
    work = tmp_path_factory.mktemp("work")
    folder = work / "results"
    cell = replace(PLUS, setting="duplicated")
    assert run(cell, protocol, work, folder) == 0, (work / f"{cell.name}.log").read_text()
    return results.read(folder / f"{cell.name}.parquet"), work


def test_a_cell_has_a_row_a_reading_and_counts_up_to_it(duplicated, protocol):
    result, work = duplicated
    assert result.column("round").tolist() == [0, 2, 4]
    assert result.column("updates").tolist() == [0, 8, 16]
    scored, skipped, trained = (result.column(n) for n in ("scored", "skipped", "trained"))
    assert (scored == skipped + trained).all()
    assert scored[-1] > 0
    for name in ("similarity_pixels", "own_similarity_edges", "l2_ratio", "frechet_edges"):
        values = result.column(name)
        assert values.shape == (3, protocol.prompts)
        assert np.isfinite(values).all()
    for name in ("heldout_loss", "kid_unseen_pixels", "frechet_unseen_edges", "misfit_edges"):
        assert result.column(name).shape == (3, protocol.samples)
        assert np.isfinite(result.column(name)).all()
    assert (
        result.column("own_similarity_pixels") <= result.column("similarity_pixels") + 1e-6
    ).all()
    pictures = result.rows[-1]["pictures"]
    assert len(pictures) == protocol.shown
    assert pictures[0][:4] == b"RIFF"
    # The pictures closest to a training image, the closest first, and which image that is.
    similarity_P = result.column("similarity_pixels")[-1]
    order = sorted(range(protocol.prompts), key=lambda p: -similarity_P[p])
    assert result.rows[-1]["closest_pictures"] == [pictures[p] for p in order]
    assert [len(row["closest_pictures"]) for row in result.rows[:-1]] == [0, 0]
    nearest = [result.about["train_ids"][i] for i in result.rows[-1]["nearest_pixels"]]
    own = [a == b for a, b in zip(nearest, result.about["prompt_ids"], strict=True)]
    assert own == result.rows[-1]["is_own_pixels"]
    assert results.closest(similarity_P, 2) == order[:2]
    assert not list((work / "cells").iterdir())


def test_duplicated_images_are_rows_of_their_own_and_all_are_drawn(duplicated, protocol):
    result, work = duplicated
    assert sorted(result.about["copies"]) == [1, 1, 1, 1, 3, 3]
    rows, once = settings.prepare("duplicated", protocol, work)
    assert sorted(settings.copies_of(once).values()) == [1] * 10 + [3] * 2
    from datasets import load_dataset

    table = load_dataset("parquet", data_dir=str(rows), split="train")
    assert len(table) == len(set(table["sample_id"])) == 10 + 2 * 3
    # What is counted by rows, in the order in which training has them, is told by images.
    ids = load_source(DataConfig(train_data_dir=str(rows), heldout_split="test")).sample_ids
    counted = settings.skips_of(rows, range(16))
    for name, copies in settings.copies_of(once).items():
        numbers = [n for n, row in enumerate(ids) if row.split(" copy ")[0] == name]
        assert (len(numbers), sum(numbers)) == (copies, counted[name])


def test_cells_that_start_together_make_their_data_once(protocol, tmp_path, monkeypatch):
    made, make = [], settings._make
    monkeypatch.setattr(settings, "_make", lambda *given: made.append(given) or make(*given))
    with ThreadPoolExecutor(4) as threads:
        places = list(
            threads.map(lambda _: settings.prepare("duplicated", protocol, tmp_path), range(4))
        )
    assert len(set(places)) == len(made) == 1
    rows, once = places[0]
    assert len(list(rows.iterdir())) == 2
    assert len(settings.copies_of(once)) == protocol.images


@pytest.mark.slow
def test_a_killed_cell_goes_on_to_the_same_numbers(duplicated, protocol, tmp_path, monkeypatch):
    whole, work, folder = duplicated[0], tmp_path, tmp_path / "results"
    cell = whole.cell
    # Dies where the last reading is there and its checkpoint is not.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from iet_sd.engine import checkpointer as c\n"
        "after = c.Checkpointer.after\n"
        "def dying(self, event):\n"
        "    if self.state.round == 4 and type(event).__name__ == 'RoundDone':\n"
        "        os._exit(9)\n"
        "    return after(self, event)\n"
        "c.Checkpointer.after = dying\n"
    )
    with monkeypatch.context() as crashing:
        crashing.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
        assert run(cell, protocol, work, folder) == 9
    assert not folder.exists()
    assert run(cell, protocol, work, folder) == 0
    after = results.read(folder / f"{cell.name}.parquet")
    for name in set(whole.rows[0]) - {"train_seconds", "read_seconds"}:
        assert [row[name] for row in after.rows] == [row[name] for row in whole.rows], name


def test_a_run_does_what_is_missing_and_no_more(duplicated, protocol, monkeypatch):
    result, work = duplicated
    folder = work / "results"
    flags = (("agc_threshold", 1.0), ("bank_bins", 1))
    cells = [result.cell, replace(result.cell, method="agc", num_shards=1, seed=1, flags=flags)]
    monkeypatch.setitem(study.STUDIES, "two", lambda rate: iter(cells))
    begun, start = [], runner.start
    monkeypatch.setattr(runner, "start", lambda cell, *to: begun.append(cell) or start(cell, *to))
    assert runner.run("two", protocol, work, folder) == 0
    assert begun == cells[1:]
    agc = results.read_all(folder, protocol)[cells[1]]
    # One model is read more often at first.
    assert agc.column("updates").tolist() == [0, 2, 4, 8, 16]
    # Before training all are one, and it is measured once.
    assert agc.rows[0]["heldout_loss"] == result.rows[0]["heldout_loss"]
    assert agc.rows[0]["read_seconds"] == result.rows[0]["read_seconds"]
    assert agc.rows[-1]["heldout_loss"] != result.rows[-1]["heldout_loss"]
    # Pictures are kept of one seed alone.
    assert (len(result.rows[0]["pictures"]), agc.rows[0]["pictures"]) == (protocol.shown, [])
    # Of one model it is known which images were skipped, all rows of each together.
    copies = settings.copies_of(settings.prepare("duplicated", protocol, work)[1])
    copies_N = np.array([copies[name] for name in agc.about["train_ids"]])
    shares_N, last = np.array(agc.about["skipped"]), agc.rows[-1]
    skips_N = shares_N * last["scored"] / copies_N.sum() * copies_N
    assert np.allclose(skips_N, skips_N.round())
    assert skips_N.sum() == pytest.approx(last["skipped"])
    assert 0 < last["skipped"] < last["scored"]
    assert "skipped" not in result.about
    assert runner.run("two", protocol, work, folder) == 0
    assert len(begun) == 1
    # Results of other settings than today's, or of another protocol, do not count.
    monkeypatch.setitem(METHODS, "agc", Method("agc", {**METHODS["agc"].flags, "rank": 5}, 1))
    assert runner.missing("two", protocol, folder) == cells[1:]
    assert runner.missing("two", replace(protocol, guidance_scale=3.0), folder) == cells


def stand_in(code):
    """`runner.start` with another program for the cell."""

    def start(cell, protocol, work, folder):
        log = (work / "log").open("w")
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
        return runner.Running(cell, process, log, time.monotonic())

    return start


def test_a_cell_that_fails_is_told_and_not_tried_again(protocol, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.STUDIES, "bad", lambda rate: iter([PLUS]))
    monkeypatch.setattr(runner, "start", stand_in("import sys; sys.exit('out of luck')"))
    assert runner.run("bad", protocol, tmp_path, tmp_path) == 1
    assert "out of luck" in capsys.readouterr().out


def test_when_the_time_is_up_a_cell_is_told_to_stop(protocol, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.STUDIES, "long", lambda rate: iter([PLUS, replace(PLUS, seed=1)]))
    monkeypatch.setattr(runner, "start", stand_in("import time; time.sleep(60)"))
    began = time.monotonic()
    assert runner.run("long", protocol, tmp_path, tmp_path, workers=2, minutes=0.02) == 0
    assert time.monotonic() - began < 30
    assert capsys.readouterr().out.count("to go on next time") == 2
