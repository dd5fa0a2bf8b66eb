"""Checkpoints at round boundaries: safetensors and JSON, whole or not there, resumed exactly.

    checkpoint-3/
      state.json              round, settings, seed, fingerprint of the data, files and their sizes
      weights.safetensors     trainable weights after the last aggregation
      samples.safetensors     shard and skip count of every sample
      proxy-0.safetensors     own weights if any, AdamW's moments, the bank
      proxy-0.json            schedule, loss scale, queue of kept samples

Every process writes the proxies it holds; a checkpoint can be resumed by any number of processes.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from iet_sd.config import Config
from iet_sd.engine.proxy import Proxy
from iet_sd.engine.rounds import State
from iet_sd.engine.step import Memory, Pending
from iet_sd.errors import UserError
from iet_sd.files import atomic_folder, staging_for
from iet_sd.method.agc import Bank

_NAME = re.compile(r"checkpoint-(\d+)")
# Settings that change what is shown or written, and not what is trained.
_FREE = {
    "cache_dir",
    "check_images",
    "dataloader_num_workers",
    "ddp_timeout",
    "output_dir",
    "overwrite_output_dir",
    "checkpointing_rounds",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "logging_dir",
    "tracker_project_name",
    "validation_prompts",
    "validation_rounds",
    "num_validation_images",
    "validation_inference_steps",
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
            _save_proxy(staging, shard, proxy)
        barrier()
        if is_main:
            save_file(state.weights, staging / "weights.safetensors")
            samples = {"shard_of": state.shard_of_N, "skips": state.skips_N}
            save_file(samples, staging / "samples.safetensors")
            files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
            content = {"round": state.round, "identity": identity, "files": files}
            (staging / "state.json").write_text(json.dumps(content, indent=2))
    if is_main and limit:
        for old in _checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    barrier()
    return final


def identity(config: Config, steps_per_round: int, sample_ids: Sequence[str]) -> dict[str, Any]:
    """What a run must have in common with the one it goes on from: settings and data."""
    mine = {k: v for k, v in config.as_dict().items() if k not in _FREE}
    digest = hashlib.sha256("\n".join(sample_ids).encode()).hexdigest()
    return {**mine, "steps_per_round": steps_per_round, "sample_ids": digest}


def find(output_dir: Path, name: str) -> Path:
    """The folder that ``--resume_from_checkpoint`` means: a path, or ``latest``.

    Errors: `UserError` if there is none.
    """
    if name == "latest":
        found = _checkpoints(output_dir)
        if not found:
            raise UserError(
                f"--resume_from_checkpoint latest: no checkpoint-* in {output_dir}. "
                "Leave the flag out to start from the beginning."
            )
        return found[-1]
    for folder in (Path(name), output_dir / name):
        if (folder / "state.json").is_file():
            return folder
    there = ", ".join(path.name for path in _checkpoints(output_dir)) or "none"
    raise UserError(
        f"--resume_from_checkpoint {name}: not a checkpoint folder. In {output_dir}: {there}."
    )


def seed_of(folder: Path) -> int:
    """The seed of the run that made the checkpoint, which a resumed run has to share."""
    return _read(folder)["identity"]["seed"]


def remove_all(output_dir: Path) -> None:
    """Delete all checkpoints of an earlier run, which would pass for those of a new one."""
    for path in output_dir.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name):
            shutil.rmtree(path)


def read_round(folder: Path, identity: dict[str, Any]) -> int:
    """The round of a checkpoint, after checking that it is whole and of this very run.

    Errors: `UserError` naming missing files, or every setting that differs.
    """
    content = _read(folder)
    for name, size in content["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(
                f"{folder} is damaged: {name} is missing or not {size} bytes long. "
                "Resume from an older checkpoint."
            )
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
    return content["round"]


def load(folder: Path, state: State, identity: dict[str, Any]) -> None:
    """Put ``state``, fresh from `Trainer.start`, back to where the checkpoint was made."""
    state.round = read_round(folder, identity)
    state.weights = load_file(folder / "weights.safetensors")
    samples = load_file(folder / "samples.safetensors")
    state.shard_of_N, state.skips_N = samples["shard_of"], samples["skips"]
    for shard, proxy in state.proxies.items():
        _load_proxy(folder, shard, proxy)


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def _checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / "state.json").is_file()]
    numbered = [(int(m[1]), path) for path in found if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def _save_proxy(folder: Path, shard: int, proxy: Proxy) -> None:
    tensors = {f"weights/{name}": tensor for name, tensor in (proxy.weights or {}).items()}
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
