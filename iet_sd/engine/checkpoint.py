"""Checkpoints: safetensors and JSON, whole or not there, resumed exactly.

    checkpoint-3/             after round 3, written by all processes together
      state.json              round, settings, data; size and CRC-32 of every file
      weights.safetensors     trainable weights after the last aggregation
      samples.safetensors     shard and skip count of every sample
      proxy-0.safetensors     own weights if any, AdamW's moments, the bank
      proxy-0.json            schedule, loss scale, queue of kept samples
      process-0-of-2/step-40/ what process 0 has done of round 4, written by it alone

Processes need each other at the end of a round only, so within one each saves by itself and goes on
where it was. The checkpoint of a round can be resumed by any number of processes.
"""

import hashlib
import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from iet_sd.config import Config
from iet_sd.engine.proxy import Proxy, live_weights
from iet_sd.engine.rounds import Progress, ShardDone, State
from iet_sd.engine.step import Counts, Memory, Pending
from iet_sd.errors import UserError
from iet_sd.files import atomic_folder, staging_for
from iet_sd.method.agc import Bank

logger = logging.getLogger(__name__)
MANIFEST = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Settings that change what is shown or written, and not what is trained.
_FREE = {
    "cache_dir",
    "check_images",
    "dataloader_num_workers",
    "ddp_timeout",
    "heldout_data_dir",
    "heldout_split",
    "output_dir",
    "overwrite_output_dir",
    "checkpointing_rounds",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "logging_dir",
    "tracker_project_name",
    "validation_prompts",
    "validation_rounds",
    "num_validation_images",
    "validation_inference_steps",
    "validation_guidance_scale",
    "dry_run",
}


def save(
    output_dir: Path,
    state: State,
    identity: dict[str, Any],
    limit: int | None,
    process_index: int,
    barrier: Callable[[], None],
) -> Path:
    """Write ``checkpoint-ROUND`` under ``output_dir``, and delete the oldest beyond ``limit``.

    ``identity`` is what a resumed run must share (see `load`). All processes take part.
    """
    final = output_dir / f"checkpoint-{state.round}"
    is_main = process_index == 0
    if is_main:
        # Of a run that went further before it was resumed from an earlier checkpoint.
        shutil.rmtree(final, ignore_errors=True)
    barrier()
    with atomic_folder(final) if is_main else nullcontext(staging_for(final)) as staging:
        barrier()
        for shard, proxy in state.proxies.items():
            _save_proxy(staging, shard, proxy, proxy.weights)
        barrier()
        if is_main:
            save_file(state.weights, staging / "weights.safetensors")
            samples = {"shard_of": state.shard_of_N, "skips": state.skips_N}
            save_file(samples, staging / "samples.safetensors")
            _seal(staging, {"round": state.round, "identity": identity})
    if is_main and state.round:
        # Nothing but the start of the run, which the settings give as well.
        shutil.rmtree(output_dir / "checkpoint-0", ignore_errors=True)
    if is_main and limit:
        for old in _checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    barrier()
    return final


def save_within_round(checkpoint: Path, state: State, process: str) -> None:
    """Write what this process has done since ``checkpoint``; ``process`` is like ``0-of-2``.

    For one process alone, at a `StepDone`.
    """
    progress = state.progress
    folder = checkpoint / f"process-{process}"
    step = progress.counts.steps + sum(event.counts.steps for event in progress.done)
    final = folder / f"step-{step}"
    folder.mkdir(exist_ok=True)
    # Of the same step, if it was damaged: a folder that is there would be merged into.
    shutil.rmtree(final, ignore_errors=True)
    older = list(folder.glob("step-*"))
    with atomic_folder(final) as staging:
        for event in progress.done:
            proxy = state.proxies[event.shard]
            _save_proxy(staging, event.shard, proxy, proxy.weights)
        proxy = state.proxies[progress.shard]
        _save_proxy(staging, progress.shard, proxy, live_weights(proxy.parameters))
        for number, total in enumerate(progress.mean.totals()):
            save_file(total, staging / f"mean-{number}.safetensors")
        save_file({"new_skips": progress.new_skips_N}, staging / "skips.safetensors")
        _seal(
            staging,
            {
                "done": [asdict(event) for event in progress.done],
                "shard": progress.shard,
                "counts": asdict(progress.counts),
                "seconds": progress.seconds,
            },
        )
    for path in older:
        shutil.rmtree(path)


def identity(config: Config, steps_per_round: int, samples: Sequence[Any]) -> dict[str, Any]:
    """What a run must have in common with the one it goes on from: settings and data.

    ``samples``: what tells each sample from another, as JSON.
    """
    mine = {k: v for k, v in config.as_dict().items() if k not in _FREE}
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    return {**mine, "steps_per_round": steps_per_round, "samples": digest}


def find(output_dir: Path, name: str | None) -> Path | None:
    """The folder that ``--resume_from_checkpoint`` means: a path, or ``latest``.

    ``latest`` is the newest that is whole; damaged ones are named in a warning. None if there is
    nothing to go on from yet, so that a job can be started again by the same command.
    Errors: `UserError` if the named one is not there, or all are damaged.
    """
    if name is None:
        return None
    if name == "latest":
        if not _checkpoints(output_dir):
            logger.warning("no checkpoint in %s yet: starting from the beginning", output_dir)
            return None
        for folder in reversed(_checkpoints(output_dir)):
            try:
                _open(folder)
            except UserError as error:
                logger.warning("%s", error)
            else:
                return folder
        raise UserError(
            f"--resume_from_checkpoint latest: every checkpoint in {output_dir} is damaged. "
            "Start from the beginning with --overwrite_output_dir."
        )
    for folder in (Path(name), output_dir / name):
        if (folder / MANIFEST).is_file():
            return folder
    there = ", ".join(path.name for path in _checkpoints(output_dir)) or "none"
    raise UserError(
        f"--resume_from_checkpoint {name}: not a checkpoint folder. In {output_dir}: {there}."
    )


def seed_of(folder: Path) -> int:
    """The seed of the run that made the checkpoint, which a resumed run has to share."""
    return _open(folder)["identity"]["seed"]


def remove_after(output_dir: Path, round: int) -> None:
    """Delete the checkpoints of later rounds, which would pass for those of the run to come."""
    for path in output_dir.glob("checkpoint-*"):
        if (name := _NAME.fullmatch(path.name)) and int(name[1]) > round:
            shutil.rmtree(path)


def load(folder: Path, state: State, identity: dict[str, Any]) -> None:
    """Put ``state``, fresh from `Trainer.start`, back to the end of the checkpoint's round.

    Errors: `UserError` naming damaged files, or every setting that differs from ``identity``.
    """
    content = _open(folder)
    saved = content["identity"]
    differences = [
        f"{key}: {saved.get(key)!r} then, {identity.get(key)!r} now"
        for key in sorted({*saved, *identity})
        if saved.get(key) != identity.get(key)
    ]
    if differences:
        raise UserError(
            f"{folder} was made with other settings or data, so training cannot go on exactly: "
            + "; ".join(differences)
            + ". Use the same ones, or start anew in another --output_dir."
        )
    state.round = content["round"]
    state.weights = load_file(folder / "weights.safetensors")
    samples = load_file(folder / "samples.safetensors")
    state.shard_of_N, state.skips_N = samples["shard_of"], samples["skips"]
    for shard, proxy in state.proxies.items():
        _load_proxy(folder, shard, proxy)


def load_within_round(
    checkpoint: Path, state: State, process: str, fresh: Progress
) -> Progress | None:
    """What this process did after ``checkpoint``, if it was saved by as many processes.

    ``fresh`` is the progress at the beginning of the round, which is filled in. The steps of a
    damaged folder are done again, with a warning.
    """
    steps = list((checkpoint / f"process-{process}").glob("step-*"))
    for folder in sorted(steps, key=lambda path: int(path.name[5:]), reverse=True):
        try:
            content = _open(folder)
        except UserError as error:
            logger.warning("%s", error)
            continue
        fresh.mean.load([load_file(path) for path in sorted(folder.glob("mean-*.safetensors"))])
        fresh.new_skips_N = load_file(folder / "skips.safetensors")["new_skips"]
        for event in content["done"]:
            fresh.done.append(ShardDone(**event | {"counts": Counts(**event["counts"])}))
        fresh.shard, fresh.seconds = content["shard"], content["seconds"]
        fresh.counts = Counts(**content["counts"])
        for shard in [*(event.shard for event in fresh.done), fresh.shard]:
            _load_proxy(folder, shard, state.proxies[shard])
        return fresh
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / MANIFEST).is_file()]
    numbered = [(int(m[1]), path) for path in found if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _seal(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest, with the checksums of all that lies in ``folder``."""
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({**content, "files": files}, indent=2))


def _open(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are as it says. Errors: `UserError`."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = content["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged: its {MANIFEST} cannot be read.") from error
    bad = [name for name, expected in files.items() if _checksum(folder / name) != expected]
    if bad:
        raise UserError(
            f"{folder} is damaged: {', '.join(bad)} missing or not as it was written. "
            "Resume from an older checkpoint."
        )
    return content


def _checksum(path: Path) -> list[int] | None:
    """Size and CRC-32 of a file: enough against damage, and as fast as the disk."""
    if not path.is_file():
        return None
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _save_proxy(
    folder: Path, shard: int, proxy: Proxy, weights: dict[str, torch.Tensor] | None
) -> None:
    tensors = {f"weights/{name}": tensor for name, tensor in (weights or {}).items()}
    for name, moments in proxy.moments().items():
        tensors |= {f"moments/{name}/{key}": tensor for key, tensor in moments.items()}
    bank = proxy.memory.bank
    tensors |= {"bank/value": bank.value_T, "bank/visits": bank.visits_T}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / f"proxy-{shard}.safetensors"
    )
    rest = {
        "lr_scheduler": proxy.lr_scheduler.state_dict(),
        "scaler": proxy.scaler.state_dict(),
        "queue": proxy.memory.queue,
    }
    (folder / f"proxy-{shard}.json").write_text(json.dumps(rest))


def _load_proxy(folder: Path, shard: int, proxy: Proxy) -> None:
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, dict[str, torch.Tensor]] = {}
    bank: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / f"proxy-{shard}.safetensors").items():
        kind, _, name = key.partition("/")
        if kind == "weights":
            weights[name] = tensor
        elif kind == "moments":
            name, _, moment = name.rpartition("/")
            moments.setdefault(name, {})[moment] = tensor
        else:
            bank[name] = tensor
    rest = json.loads((folder / f"proxy-{shard}.json").read_text())
    proxy.weights = weights or None
    proxy.load_moments(moments)
    proxy.lr_scheduler.load_state_dict(rest["lr_scheduler"])
    # The schedule writes a rate only when it steps; the next update needs the one it last wrote.
    for group, rate in zip(
        proxy.optimizer.param_groups, proxy.lr_scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    proxy.scaler.load_state_dict(rest["scaler"])
    queue = [Pending(*pending) for pending in rest["queue"]]
    proxy.memory = Memory(Bank(bank["value"], bank["visits"]), queue)
