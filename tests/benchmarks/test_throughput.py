"""The speed benchmarks: their arithmetic on made-up runs, their pipeline, and a short profile."""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.throughput import __main__ as commands
from benchmarks.throughput import rows, scaling, tables
from benchmarks.throughput.arithmetic import (
    Counts,
    Run,
    Spread,
    Work,
    ratios,
    spread,
    steady,
    work_per_image,
)
from benchmarks.throughput.compare import compare, summary
from benchmarks.throughput.measure import Bench, plain_counts, read_rounds
from benchmarks.throughput.pipeline import (
    SD15_TFLOP,
    build_images,
    build_pipeline,
    count_work,
)
from benchmarks.throughput.rows import ROWS, Setting, argv_of, method_flags
from iet_sd import diffusion
from iet_sd.arguments import load
from iet_sd.method import agc, taa
from tests.pipelines import RESOLUTION


def setting(**given):
    return Setting(**{"model": Path("model"), "data": Path("data"), "resolution": 128} | given)


def run_of(updates, start, per_update, trained_share=1.0, peak=2**30):
    """A run as it would be if each update took the same."""
    whole = plain_counts(updates, 8)
    trained = int(whole.scored * trained_share)
    counts = Counts(**{**asdict(whole), "trained": trained, "skipped": whole.scored - trained})
    seconds = start + updates * per_update
    return Run(seconds, 0.8 * seconds, peak, counts)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("throughput") / "model")


def test_two_lengths_give_rate_and_start():
    found = steady(run_of(64, 9.0, 0.25), run_of(192, 9.0, 0.25, peak=2**31))
    assert found.images_per_second == pytest.approx(8 / 0.25)
    assert found.updates_per_second == pytest.approx(4)
    assert found.cpu_per_image == pytest.approx(0.8 * 0.25 / 8)
    assert found.start == pytest.approx(9)
    assert found.peak == 2**31
    assert found.counts.updates == 128


def test_the_start_is_what_rounds_leave_if_they_have_told():
    """At the beginning, while the bank fills, steps are cheaper and all is trained."""
    short = replace(run_of(64, 9.0, 0.25, 1.0), loop=16.0)
    found = steady(short, run_of(192, 9.0, 0.25, 0.8))
    assert found.start == pytest.approx(9)
    assert replace(short, loop=14.0).start(0.03) == pytest.approx(11)
    trained = int(192 * 8 * 0.8) - 64 * 8
    assert found.images_per_second == pytest.approx(trained / (128 * 0.25))


@pytest.mark.parametrize("long", [run_of(64, 9.0, 0.25), run_of(192, -40.0, 0.25)])
def test_runs_that_say_nothing_are_refused(long):
    with pytest.raises(SystemExit, match="too short to measure"):
        steady(run_of(64, 9.0, 0.25), long)


def test_ratios_are_within_a_repetition():
    assert ratios([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Spread(2.0, 1.0, 3.0)
    assert f"{spread([1.0, 3.0, 2.0]):.1f}" == "2.0 (1.0..3.0)"
    assert f"{spread([2.0]):.1f}" == "2.0"
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_work_of_a_trained_image_by_hand():
    """8 scored, 2 skipped, 6 trained, of which 4 in a second pass of their own."""
    counts = Counts(scored=8, skipped=2, trained=6, augmented=4, forward=12, backward=12, encoded=4)
    work = Work(vae=600, text=6, unet=480, backward=960)
    cached = {"vae": 400, "text": 0, "unet": 960, "backward": 1920}
    assert work_per_image(counts, work, cached=True) == cached
    assert work_per_image(counts, work, cached=False) == {**cached, "text": 12}


def test_counts_are_read_from_rounds_alone(tmp_path):
    lines = [
        {"kind": kind, "round": number, **asdict(plain_counts(2, 4)), "seconds": 1.5}
        for number, kind in ((1, "shard"), (1, "round"), (2, "shard"), (2, "round"), (2, "probe"))
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_rounds(path) == (plain_counts(4, 4), 3.0)


def test_the_pipeline_has_the_proportions_of_stable_diffusion(pipeline):
    work = asdict(count_work(pipeline, rows.RESOLUTION, "full"))
    for name, tolerance in (("vae", 0.05), ("text", 0.1)):
        wanted = SD15_TFLOP[name] / SD15_TFLOP["unet"]
        assert work[name] / work["unet"] == pytest.approx(wanted, rel=tolerance)
    assert work["backward"] == pytest.approx(2 * work["unet"], rel=0.02)
    lora = count_work(pipeline, rows.RESOLUTION, "lora")
    assert lora.unet < lora.backward < 0.6 * work["backward"]


def test_work_is_that_of_the_weights(pipeline):
    """Counted on meta tensors; here with weights, and attention by products, which CPUs count."""
    real = StableDiffusionPipeline.from_pretrained(pipeline)
    passes = {
        "vae": lambda: real.vae.encode(torch.zeros(1, 3, 32, 32)),
        "unet": lambda: real.unet(torch.zeros(1, 4, 4, 4), 0, torch.zeros(1, 77, 32)),
    }
    work = asdict(count_work(pipeline, 32, "full"))
    for name, once in passes.items():
        getattr(real, name).set_default_attn_processor()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            once()
        assert work[name] == counter.get_total_flops()


def test_threshold_and_sharpness_give_the_shares():
    """On losses of noise alone, as of an untrained model; and a bank, updated batch by batch."""
    flags = method_flags(rows.RESOLUTION)
    bank, skipped, augmented, scored = agc.empty_bank(flags["bank_bins"]), 0, 0, 0
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        noise = torch.randn(8, 4 * 16 * 16, generator=generator)
        loss_B = noise.square().mean(1)
        bins_B = torch.randint(0, flags["bank_bins"], (8,), generator=generator)
        reference_B = agc.reference(bank, bins_B, flags["bank_decay"], "corrected")
        bank = agc.update_bank(bank, bins_B, loss_B, flags["bank_decay"])
        if step < 20:
            continue
        keep_B = agc.keep_mask(loss_B, reference_B, flags["agc_threshold"])
        strength_B = taa.strength(
            loss_B, reference_B, flags["agc_threshold"], flags["taa_sharpness"]
        )
        near_B = keep_B & (strength_B >= rows.TAA_MIN_STRENGTH)
        scored, skipped = scored + 8, skipped + int((~keep_B).sum())
        augmented += int(near_B.sum())
    assert skipped / scored == pytest.approx(rows.SKIPPED, abs=0.03)
    assert augmented / (scored - skipped) == pytest.approx(rows.AUGMENTED, abs=0.04)


def test_losses_of_the_pipeline_are_those_of_noise(pipeline):
    """What threshold and sharpness rest on."""
    unet = StableDiffusionPipeline.from_pretrained(pipeline).unet
    noise = diffusion.draw_noise(range(16), "test", (4, 16, 16), 0.0)
    with torch.no_grad():
        predicted = unet(noise, 500, torch.randn(16, 77, 32), return_dict=False)[0]
    loss_B = diffusion.per_sample_loss(predicted, noise)
    assert torch.allclose(loss_B, noise.square().mean((1, 2, 3)), rtol=0.01)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if not row.peer])
def test_rows_of_ours_are_as_long_as_the_peer(key, mode, tmp_path):
    """By the settings that our own command line makes of the flags."""
    chosen = setting(train_mode=mode, num_shards=2, steps=3)
    argv = argv_of(ROWS[key], chosen, 4, tmp_path / "output", tmp_path)
    config = load(argv)
    method = config.method
    assert config.training.max_train_steps == 2 * 3 * 4
    assert method.num_shards == (2 if ROWS[key].skips else 1)
    assert method.num_rounds == 4
    assert config.training.cache == ("on" if ROWS[key].cached else "off")
    assert config.model.train_mode == mode
    if ROWS[key].skips:
        assert method.agc_threshold == pytest.approx(0.97, abs=0.01)
        assert method.taa == (method.method == "iet_agc_plus")
        # What the shares are computed from.
        assert method.taa_min_strength == (0 if method.preset == "paper" else 0.1)


def test_the_peer_is_told_what_we_are_told(tmp_path):
    chosen = setting(ours=("--torch_compile",))
    peer = argv_of(ROWS["a"], chosen, 2, tmp_path / "output", tmp_path)
    ours = argv_of(ROWS["b"], chosen, 2, tmp_path / "output", tmp_path)
    assert ours[: len(peer)] == peer
    assert ours[-1] == "--torch_compile"
    assert "--torch_compile" not in peer


def test_a_missing_peer_script_is_one_message(monkeypatch, capsys, tmp_path):
    flags = ["compare", "--diffusers_scripts", str(tmp_path), "--train_mode", "lora"]
    monkeypatch.setattr(sys, "argv", ["throughput", *flags])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path} has no train_text_to_image_lora.py" in message
    assert "--diffusers_scripts" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["compare", "--rounds", "3", "6"], "two even numbers"),
        (["scaling", "--rounds", "4", "2"], "two even numbers"),
        (["profile", "--images", "65"], "multiple of --train_batch_size 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["throughput", *flags])
    with pytest.raises(SystemExit):
        commands.main()
    assert message in capsys.readouterr().err


def test_a_run_is_a_process_with_its_time_memory_and_counts(tmp_path):
    """With a script in diffusers' place; one that fails is quoted."""
    script = tmp_path / rows.PEERS["full"]
    script.write_text(
        "import os, sys, time\n"
        "updates = int(sys.argv[sys.argv.index('--max_train_steps') + 1])\n"
        "assert os.environ['OMP_NUM_THREADS'] == '3', 'threads'\n"
        "kept = bytearray(100 * 2**20)\n"
        "time.sleep(updates / 100)\n"
        "sys.exit('no more') if updates > 50 else None\n"
    )
    log = tmp_path / "runs.jsonl"
    bench = Bench(tmp_path, threads=3, peers=tmp_path, log=log)
    chosen = setting(num_shards=2, steps=5)
    began = time.monotonic()
    run = bench.run("a", ROWS["a"], chosen, 2)
    wall = time.monotonic() - began
    assert run.counts == plain_counts(20, 8)
    assert 0.2 <= run.seconds <= wall
    assert 0 < run.cpu < run.seconds
    assert 100 * 2**20 < run.peak < 200 * 2**20
    with pytest.raises(SystemExit, match="row a failed:\nno more"):
        bench.run("a", ROWS["a"], chosen, 6)
    (line,) = log.read_text().splitlines()
    assert json.loads(line) == {"row": "a", "rounds": 2, **asdict(run)}


def test_rows_are_run_in_turns_after_a_first_run_that_makes_the_caches(
    pipeline, tmp_path, monkeypatch
):
    """A B A B, short and long; what is written is of these, and the start of the first ones."""
    done = []

    def run(self, key, row, setting, rounds):
        assert row is ROWS[key]
        done.append((key, rounds))
        return run_of(setting.updates(rounds), 20.0 if len(done) <= 2 else 8.0, 0.25)

    monkeypatch.setattr(Bench, "run", run)
    monkeypatch.setattr(Bench, "imports", lambda self: done.append("imports") or 5.0)
    monkeypatch.setattr(Bench, "matrix_speed", lambda self: 1e11)
    _, record = compare(Bench(tmp_path), setting(model=pipeline), ("a", "b"), (2, 6), 2)
    turn = ["imports", ("a", 2), ("a", 6), ("b", 2), ("b", 6)]
    assert done == [("a", 2), ("b", 2), *turn, *turn]
    assert [each["start"] for each in record["steady"]["b"]] == pytest.approx([8.0, 8.0])
    assert record["first"]["b"]["seconds"] == 20.0 + 64 * 0.25


def test_the_text_of_a_comparison(pipeline, tmp_path, monkeypatch):
    """Ours twice as fast, in three repetitions of which the second is slow for both."""
    monkeypatch.setattr(Bench, "matrix_speed", lambda self: 1e11)
    runs = {"a": [], "b": [], "d": []}
    for slow in (1.0, 1.5, 1.0):
        for key, per_update, share in (("a", 0.5, 1), ("b", 0.25, 1), ("d", 0.3, 0.75)):
            pair = [run_of(n, 8.0 * slow, per_update * slow, share) for n in (64, 192)]
            runs[key].append(tuple(pair))
    first = {key: run_of(64, 20.0, 0.25) for key in runs}
    text, record = summary(
        Bench(tmp_path), setting(model=pipeline), (2, 6), runs, first, [5.0, 7.5, 5.0]
    )
    table = text.split("| row |")[1]
    assert "| a: diffusers' script | 16.00 (10.67..16.00) | 1.00 |" in table
    assert "| b: none | 32.00 (21.33..32.00) | 2.00 |" in table
    assert "| d: iet_agc_plus, corrected | 20.00 (13.33..20.00) | 1.25 |" in table
    assert "| images per second, b of a | at least 1.3 | 2.00 | met |" in text
    assert "| start, d of imports | at most 1.2 | 1.60 | missed |" in text
    assert "of e" not in text
    json.dumps(record)
    assert record["steady"]["b"][0]["start"] == pytest.approx(8)


def test_sizes_grow_one_at_a_time(tmp_path):
    base = setting(num_shards=2)
    found = [
        (p.axis, p.factor, p.row, count, p.setting.resolution, p.setting.num_shards)
        for p, count in scaling.points(base, 64, (1, 2), tmp_path)
    ]
    assert found == [
        ("images", 1, "b", 64, 128, 2),
        ("images", 1, "d", 64, 128, 2),
        ("images", 2, "b", 128, 128, 2),
        ("images", 2, "d", 128, 128, 2),
        ("shards", 1, "d", 64, 128, 2),
        ("shards", 2, "d", 64, 128, 4),
        ("resolution", 1, "b", 64, 128, 2),
        ("resolution", 1, "d", 64, 128, 2),
        ("resolution", 2, "b", 64, 256, 2),
        ("resolution", 2, "d", 64, 256, 2),
    ]


def test_growth_is_of_the_smallest_size(tmp_path):
    points = [p for p, _ in scaling.points(setting(), 64, (1, 2), tmp_path) if p.row == "d"]
    found = {
        (p.row, p.setting): [
            steady(run_of(64, 8.0, 0.25 * p.factor), run_of(192, 8.0, 0.25 * p.factor))
        ]
        for p in points
        if p.axis == "images"
    }
    lines = scaling.table(points[:2], found).splitlines()[2:]
    name = "d: iet_agc_plus, corrected"
    assert lines == [
        f"| {name} | 1 x images | 31.2 | 1.00 | 25.0 | 1024 | 1.00 | 8.0 |",
        f"| {name} | 2 x images | 62.5 | 2.00 | 50.0 | 1024 | 1.00 | 8.0 |",
    ]


def test_pictures_are_of_the_size_and_captioned(tmp_path):
    folder = build_images(tmp_path / "data", 3, RESOLUTION)
    again = build_images(tmp_path / "again", 3, RESOLUTION)
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["00000.png", "00001.png", "00002.png", "metadata.jsonl"]
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert len({(folder / name).read_bytes() for name in files}) == 4
    assert tables.markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
