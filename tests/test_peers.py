"""A process of several that is killed while another waits for it, under ``accelerate launch``."""

import signal
import time

import psutil
import pytest

from tests.launching import ROOT, Launched, finish


def process_of(run, rank):
    """The training process of a rank."""
    (found,) = [
        process
        for process in psutil.Process(run.launcher.pid).children(recursive=True)
        if process.environ().get("RANK") == str(rank)
    ]
    return found


def until_ended(process, seconds=60):
    """Wait until it has ended, though its parent, which is held, has not taken note of it."""
    end = time.monotonic() + seconds
    while process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, process
        time.sleep(0.01)


def test_the_death_of_one_ends_the_other_with_one_line(argv, tmp_path):
    """Of three shards process 1 has one, and then waits for process 0, which has two.

    The launcher is held meanwhile: it ends all others when one has ended, and its signal may come
    before process 1 has found out by itself.
    """
    run = Launched(argv(num_shards=3, steps_per_round=40, train_batch_size=2), processes=2)
    saved = tmp_path / "output" / "checkpoint-0" / "process-1-of-2" / "shard-1-done"
    launcher = psutil.Process(run.launcher.pid)
    try:
        run.until(saved.exists)
        other = process_of(run, 1)
        launcher.suspend()
        process_of(run, 0).kill()
        until_ended(other)
        launcher.resume()
        assert run.wait() != 0
    finally:
        run.kill()
    output = run.output()
    # Behind what is left of a bar of the process that was killed.
    (line,) = [line for line in output.splitlines() if "error (process 1): " in line]
    message = line.partition("error (process 1): ")[2]
    assert message.startswith("Another process of this run has ended.")
    assert message.endswith("Start all processes again with --resume_from_checkpoint latest.")
    assert "gloo" not in output
    assert f'File "{ROOT}' not in output, "a traceback of ours"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGTERM, [1]),
        pytest.param(signal.SIGINT, [0, 1], marks=pytest.mark.slow),
    ],
    ids=["the one that waits", "Ctrl-C"],
)
def test_a_signal_while_the_main_process_draws_is_obeyed_at_once(number, told, argv, tmp_path):
    """The round is trained, and the other waits to save it; the launcher's signal ends the rest."""
    drawing = ["--validation_prompts", *["a cat"] * 99, "--validation_inference_steps", "999"]
    flags = argv(validation_rounds=1, num_validation_images=99)
    run = Launched([*flags, *drawing], processes=2)
    metrics = tmp_path / "output" / "metrics.jsonl"
    try:
        run.until(lambda: metrics.exists() and '"round": 1' in metrics.read_text())
        run.processes()
        for rank in told:
            process_of(run, rank).send_signal(number)
        assert run.wait(60) != 0
    finally:
        run.kill()
    name = signal.Signals(number).name
    said = f"Stopped by {name}. What was done is saved: go on with --resume_from_checkpoint latest."
    assert run.output().count(said) == 2
    assert "Another process" not in run.output()


def test_a_mistake_that_the_main_process_meets_first_is_its_line_alone(argv):
    """The other waits for it then, to read the data after it."""
    run = Launched(argv(train_data_dir="nowhere"), processes=2)
    assert run.wait() != 0
    output = run.output()
    assert "error: " in output
    assert "nowhere" in output
    assert "gloo" not in output
    assert f'File "{ROOT}' not in output, "a traceback of ours"


def test_what_becomes_of_a_shard_is_said_whichever_process_has_it(argv):
    """And once, as is what both find."""
    far = {"learning_rate": 1e30, "lr_warmup_steps": 0, "on_nonfinite": "skip_batch"}
    said = finish(argv(**far, num_rounds=1, dream_detail_preservation=2), processes=2)
    for shard in (0, 1):
        assert said.count(f"is not finite in round 1, shard {shard}, step 2, samples ") == 1
        assert said.count(f"round 1, shard {shard} ended after 1 of 2 updates") == 1
    assert said.count("--dream_detail_preservation: of no effect") == 1
