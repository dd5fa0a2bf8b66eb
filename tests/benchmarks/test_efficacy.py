"""The efficacy study on a tiny pipeline: cells, resuming, studies, and the second embedder."""

import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.efficacy import beyond, controls, report, results, runner, settings, study
from benchmarks.efficacy.cell import argv_of, flags_of
from benchmarks.efficacy.edges import edges
from benchmarks.efficacy.encoding import encode_each_once
from benchmarks.efficacy.methods import METHODS, Method
from benchmarks.efficacy.protocol import ROOT, Protocol
from benchmarks.efficacy.readings import kid_of_each
from benchmarks.efficacy.study import DEFAULT_RATE, TUNING_SEED, Cell
from iet_sd import arguments
from iet_sd.evaluation.closeness import unit
from iet_sd.evaluation.kid import kid_interval


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
        shown=2,
    )


PLUS = Cell("fluent", "full", "iet_agc_plus", 1e-3, 0, 2)


def run(cell, protocol, work, folder):
    """A cell by its own command; returns its exit status."""
    work.mkdir(parents=True, exist_ok=True)
    running = runner.start(cell, protocol, work, folder)
    return running.process.wait(120)


# Cells


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
    for name in ("similarity_pixels", "own_similarity_edges", "l2_ratio", "train_loss"):
        values = result.column(name)
        assert values.shape == (3, protocol.prompts)
        assert np.isfinite(values).all()
    assert result.column("heldout_loss").shape == (3, protocol.samples)
    assert (
        result.column("own_similarity_pixels") <= result.column("similarity_pixels") + 1e-6
    ).all()
    pictures = result.rows[-1]["pictures"]
    assert len(pictures) == protocol.shown
    assert pictures[0][:4] == b"RIFF"
    assert not list((work / "cells").iterdir())


def test_duplicated_images_are_rows_of_their_own_and_all_are_drawn(duplicated, protocol):
    result, work = duplicated
    assert sorted(result.about["copies"]) == [1, 1, 1, 1, 3, 3]
    rows, once = settings.prepare("duplicated", protocol, work)
    assert sorted(settings.copies_of(once).values()) == [1] * 10 + [3] * 2
    from datasets import load_dataset

    table = load_dataset("parquet", data_dir=str(rows), split="train")
    assert len(table) == len(set(table["sample_id"])) == 10 + 2 * 3


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
    cells = [result.cell, replace(result.cell, method="plain", num_shards=1, seed=1)]
    monkeypatch.setitem(study.STUDIES, "two", lambda rate: iter(cells))
    begun, start = [], runner.start
    monkeypatch.setattr(runner, "start", lambda cell, *to: begun.append(cell) or start(cell, *to))
    assert runner.run("two", protocol, work, folder) == 0
    assert begun == cells[1:]
    plain = results.read_all(folder, protocol)[cells[1]]
    # One model is read more often at first.
    assert plain.column("updates").tolist() == [0, 2, 4, 8, 16]
    # Before training all are one, and it is measured once.
    assert plain.rows[0]["heldout_loss"] == result.rows[0]["heldout_loss"]
    assert plain.rows[0]["read_seconds"] == result.rows[0]["read_seconds"]
    assert plain.rows[-1]["heldout_loss"] != result.rows[-1]["heldout_loss"]
    # Pictures are kept of one seed alone.
    assert (len(result.rows[0]["pictures"]), plain.rows[0]["pictures"]) == (protocol.shown, [])
    assert runner.run("two", protocol, work, folder) == 0
    assert len(begun) == 1
    # Results of other settings than today's, or of another protocol, do not count.
    monkeypatch.setitem(METHODS, "plain", Method("plain", {**METHODS["plain"].flags, "rank": 5}, 1))
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


# Studies and methods


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_cell_of_a_study_is_one_that_the_command_line_takes(name):
    cells = study.cells(name, lambda mode, method: DEFAULT_RATE[mode, method])
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) == cell
        protocol = Protocol()
        folders = {"pretrained_model_name_or_path": "m", "train_data_dir": "d"}
        config = arguments.load(argv_of(folders | flags_of(cell, protocol)))
        total = config.method.steps_per_round * config.method.num_rounds * cell.num_shards
        assert total == protocol.updates * cell.times


def test_every_method_is_in_a_study_and_every_swap_exists():
    cells = [
        c for name in study.STUDIES for c in study.cells(name, lambda m, t: DEFAULT_RATE[m, t])
    ]
    assert {cell.method for cell in cells} == set(METHODS)
    swaps = {method.swap for method in METHODS.values() if method.swap}
    assert swaps <= set(vars(controls)) ^ set(vars(beyond)), "each in one of the two"


def fake(cell, heldout_loss):
    rows = [{"heldout_loss": [value, value]} for value in (0.0, *heldout_loss)]
    return results.Result(cell, {}, {}, rows)


def test_rates_are_chosen_by_the_lowest_heldout_loss_of_the_tuning_seed():
    low, middle, high = sorted(study.tuning("full", "iet"), key=lambda cell: cell.learning_rate)
    found = {low: fake(low, [5, 4]), middle: fake(middle, [4, 3]), high: fake(high, [2, 9])}
    other = replace(low, seed=0)
    assert results.tuned_rate(found, "full", "iet") == high.learning_rate
    assert (
        results.tuned_rate(found | {other: fake(other, [1, 1])}, "full", "iet")
        == high.learning_rate
    )
    assert results.tuned_rate({low: found[low], high: found[high]}, "full", "iet") is None
    assert {low.seed, middle.seed, high.seed} == {TUNING_SEED}


# The encoder and the second embedder


@torch.no_grad()
def test_encoding_each_once_gives_the_encoders_moments(monkeypatch):
    vae = AutoencoderKL(sample_size=32)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = vae.encode(x).latent_dist
    monkeypatch.setattr(AutoencoderKL, "encode", AutoencoderKL.encode)
    encode_each_once()
    first, again = (vae.encode(x[[2, 0, 1]]).latent_dist for _ in range(2))
    assert torch.allclose(first.mean, plain.mean[[2, 0, 1]], atol=1e-5)
    assert torch.allclose(first.std, plain.std[[2, 0, 1]], atol=1e-5)
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(vae.encode(x[:1]).latent_dist.mean[0], again.mean[1])


def test_edges_know_a_shifted_shape_from_another_one():
    def page(draw):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        draw(pixels)
        return Image.fromarray(pixels)

    def bar(top, across):
        def draw(pixels):
            part = pixels[top : top + 8, 16:48] if across else pixels[16:48, top : top + 8]
            part[:] = (200, 30, 30)

        return draw

    images = [page(bar(24, True)), page(bar(25, True)), page(bar(24, False)), page(lambda _: None)]
    features = edges(images)
    assert features.shape == (4, 176)
    assert features.dtype == np.float32
    length = np.linalg.norm(features, axis=1)
    cosine = features @ features.T / np.maximum(np.outer(length, length), 1e-12)
    assert cosine[0, 1] > 0.9
    assert cosine[0, 2] < 0.7
    # A page without ink has no features, and resembles nothing.
    assert (features[3] == 0).all()


def test_what_each_picture_adds_to_kid_has_its_mean_and_its_spread():
    rng = np.random.default_rng(0)
    gen, real = rng.standard_normal((200, 5)), rng.standard_normal((150, 5)) + 0.3
    gen, real = (unit(each) * np.sqrt(5) for each in (gen, real))
    each = kid_of_each(gen, real)
    whole = kid_interval(gen, real, np.arange(200)).value
    assert each.mean() == pytest.approx(whole, rel=1e-9)
    # The jackknife over pictures.
    without = [
        kid_interval(np.delete(gen, p, 0), real, np.arange(199)).value for p in range(0, 200, 4)
    ]
    assert 199 * np.std(without) == pytest.approx(each[::4].std(), rel=0.02)
    assert np.corrcoef(-np.array(without), each[::4])[0, 1] > 0.999


# The report


def planted(protocol, method, seed, shards, factor, setting="fluent"):
    """A result whose memorization is ``factor`` times that of plain, at the same losses."""
    rng = np.random.default_rng(seed)
    R, P = 5, 20
    heldout = np.array([0.08, 0.06, 0.05, 0.055, 0.07])
    gap = factor * np.array([0.0, 0.005, 0.01, 0.02, 0.04])
    memory = factor * np.array([0.0, 0.05, 0.1, 0.2, 0.4])
    around = rng.standard_normal(P) / 1000
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(picture, "WEBP")
    rows = [
        {
            "round": 2 * r,
            **dict.fromkeys(results.COUNTS, 128 * r),
            "moved": 0,
            "strength_sum": 0.0,
            "train_seconds": 100.0 * r,
            "heldout_loss": (heldout[r] + around).tolist(),
            "train_loss": (heldout[r] - gap[r] + around).tolist(),
            "l2_ratio": (1.2 - memory[r] + around).tolist(),
            "pictures": [picture.getvalue()] * 2,
            "read_seconds": 10.0,
        }
        | {
            f"{key}_{embedder}": value
            for embedder in ("pixels", "edges")
            for key, value in {
                "similarity": (0.5 + memory[r] + around).tolist(),
                "own_similarity": (0.4 + memory[r] + around).tolist(),
                "is_own": (np.arange(P) < 20 * memory[r]).tolist(),
                "authentic": (np.arange(P) > 20 * memory[r]).tolist(),
                "kid": (heldout[r] + around).tolist(),
            }.items()
        }
        for r in range(R)
    ]
    rate = DEFAULT_RATE["full", METHODS[method].tuned_as]
    cell = Cell(setting, "full", method, rate, seed, shards)
    about = {
        "prompts": [f"prompt {p}" for p in range(P)],
        "prompt_ids": ["1f600"] * P,
        "copies": [10] * 5 + [1] * 15,
        "flags": json.loads(json.dumps(flags_of(cell, Protocol()))),
        "heldout_similarity": {"pixels": [0.5] * 8, "edges": [0.5] * 8},
    }
    return results.Result(cell, protocol.as_dict(), about, rows)


def spoilt(result):
    """The same with pictures that look like nothing."""
    for row in result.rows:
        row["kid_edges"] = [value + 0.1 for value in row["kid_edges"]]
    return result


@pytest.fixture
def report_of(monkeypatch, tmp_path):
    """The text of RESULTS.md for some results."""

    def make(found):
        monkeypatch.setattr(report.files, "read_all", lambda *_: {r.cell: r for r in found})
        monkeypatch.setattr(report, "_training_images", lambda *_: [])
        return report.write(tmp_path, tmp_path, Protocol()).read_text()

    return make


def test_the_report_says_what_was_planted_and_of_how_many_seeds(report_of, tmp_path):
    protocol = Protocol()
    text = report_of(
        [
            *(planted(protocol, "plain", seed, 1, 1.0) for seed in (0, 1)),
            *(planted(protocol, "iet", seed, 4, 0.5) for seed in (0, 1)),
            planted(protocol, "agc", 0, 1, 1.5),
            spoilt(planted(protocol, "ema", 0, 1, 0.5)),
            planted(protocol, "plain", TUNING_SEED, 1, 1.0),
            planted(protocol, "iet", TUNING_SEED, 4, 0.5),
        ]
    )
    assert re.search(r"\*\*iet\*\* \(n = 2\): less\. .*50% \[\d+%, \d+%\] of it", text)
    assert re.search(r"\*\*agc\*\* \(n = 1\): more\.", text)
    assert re.search(r"\*\*ema\*\* \(n = 1\): less, with worse pictures\.", text)
    glance = text.partition("## At a glance")[2].partition("## 256")[0]
    rows = [line for line in glance.splitlines() if line.startswith("| fluent, full | ")]
    iet, at_end = (row for row in rows if row.startswith("| fluent, full | iet |"))
    assert re.search(r"\| 2 \| \*\*less\*\*: .*50% \[\d+%, \d+%\] of it", iet)
    assert METHODS["iet"].text in iet
    assert re.search(r"\| 2 \| \+0\.400 \| \+0\.200 \| 50% \[\d+%, \d+%\] ", at_end)
    assert at_end.endswith("| **less**, equal quality |")
    spoilt_row = [row for row in rows if row.startswith("| fluent, full | ema |")][-1]
    assert spoilt_row.endswith("| **less**, worse KID (edges) |")
    assert "the caption's own for 0% of pictures before training, 10% at the lowest" in text
    for name in re.findall(r"\]\((pictures/.+?)\)", text):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 60
    # Cells and hours that are left.
    wanted = len(study.cells("first", lambda mode, method: DEFAULT_RATE[mode, method]))
    assert f"| `first` | {wanted} | 8 |" in text


def test_the_report_marks_what_is_to_be_run_again(report_of):
    found = [planted(Protocol(), "plain", 0, 1, 1.0), planted(Protocol(), "iet", 0, 4, 0.5)]
    found[1].about["flags"]["num_rounds"] = 3
    text = report_of(found)
    assert "| iet, to be run again | 1 |" in text
    assert re.search(r"\| `first` \| \d+ \| 1 \|", text)


def test_the_report_tells_duplicated_images_apart(report_of):
    found = [planted(Protocol(), "plain", 0, 1, 1.0, "duplicated")]
    found.append(planted(Protocol(), "agc", 0, 1, 0.5, "duplicated"))
    # Those that are often are given back with half of the similarity that others have.
    often = np.array(found[1].about["copies"]) > 1
    for row in found[1].rows[1:]:
        row["similarity_pixels"] = list(np.where(often, 0.5, row["similarity_pixels"]))
    text = report_of(found)
    # Of 20 prompts the first 8 give their own image, of which 5 are shown often.
    assert "| plain | 1 | 20% | 100% |" in text
    table = text.partition("excess similarity of images shown often")[2].partition("###")[0]
    (row,) = [line.split("|") for line in table.splitlines() if line.startswith("| agc ")]
    baseline = np.mean(found[1].about["heldout_similarity"]["pixels"])
    assert float(row[-6]) == pytest.approx(0.5 - baseline, abs=6e-4)


def test_the_report_of_nothing_and_of_plain_alone_is_whole(report_of):
    assert "| `first` |" in report_of([])
    text = report_of([planted(Protocol(), "plain", 0, 1, 1.0)])
    assert "Nothing to compare with plain yet." in text


def test_the_report_of_the_tuning_seed_alone_claims_no_more(report_of):
    found = [
        planted(Protocol(), "plain", TUNING_SEED, 1, 1.0),
        planted(Protocol(), "iet_agc_plus", TUNING_SEED, 4, 0.5),
    ]
    text = report_of(found)
    assert "A first look, one seed, the one that rates are chosen by" in text
    assert "## 256 Fluent emoji" not in text
