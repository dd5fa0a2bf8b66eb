"""A process of several that is killed while another waits for it, under ``accelerate launch``."""

import psutil

from tests.launching import Launched


def process_of(run, rank):
    """The training process of a rank."""
    (found,) = [
        process
        for process in psutil.Process(run.launcher.pid).children(recursive=True)
        if process.environ().get("RANK") == str(rank)
    ]
    return found


def test_the_death_of_one_ends_the_other_with_one_line(argv, tmp_path):
    """Of three shards process 1 has one, and then waits for process 0, which has two."""
    run = Launched(argv(num_shards=3, steps_per_round=40, train_batch_size=2), processes=2)
    saved = tmp_path / "output" / "checkpoint-0" / "process-1-of-2" / "shard-1-done"
    try:
        run.until(saved.exists)
        other = process_of(run, 1)
        process_of(run, 0).kill()
        other.wait(timeout=10)
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
    assert "iet_sd/engine" not in output, "a traceback of ours"
