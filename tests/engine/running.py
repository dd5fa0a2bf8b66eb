"""Training as the command line does it, killed where a test wants it."""

import json
from dataclasses import replace

from iet_sd.engine import checkpoint
from iet_sd.engine.checkpointer import Checkpointer
from iet_sd.engine.identity import identity
from iet_sd.engine.rounds import RoundDone
from iet_sd.engine.stopping import Signals
from iet_sd.engine.tracking import MetricsFile

# Every loss below the running mean is skipped, so that there is something to remember.
RUN = {
    "num_shards": 2,
    "num_rounds": 4,
    "steps_per_round": 3,
    "lr_scheduler": "cosine",
    "agc_threshold": 1.0,
    "bank_bins": 1,
    # Every step with something to train is an update.
    "taa_min_batch": 0.0,
}
LORA = {"train_mode": "lora", "rank": 2}


def same(config, trainer):
    """The identity of a run on the same model and data."""
    return identity(config, trainer.steps_per_round, "model", ["a sample"])


def resuming(config, name="latest", **given):
    return replace(config, training=replace(config.training, resume_from_checkpoint=name, **given))


def run(config, folder, trainer_for, stop_at=None, saves=True):
    """Train into ``folder``; killed after event ``stop_at``, or before it was saved."""
    config = replace(config, training=replace(config.training, output_dir=str(folder)))
    folder.mkdir(exist_ok=True)
    trainer, state = trainer_for(config)
    checkpointer = Checkpointer(config.training, trainer, state, same(config, trainer), Signals())
    found = checkpoint.find(folder, config.training.resume_from_checkpoint)
    checkpointer.load(found)
    checkpointer.begin(found)
    metrics = MetricsFile(folder / "metrics.jsonl", state.history)
    for number, event in enumerate(trainer.run(state), 1):
        if isinstance(event, RoundDone):
            metrics.add(event)
        if number == stop_at and not saves:
            break
        checkpointer.after(event)
        if number == stop_at:
            break
    return trainer, state


def weights(trainer):
    return {k: p.detach().clone() for k, p in trainer.parameters.items()}


def timeless(path):
    """The lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in lines
    ]


def flip(path):
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
