"""Does memory grow with the number of shards, and by as much as the formula says?

    python -m benchmarks.proxy_memory

For K = 1, 2, 4, 8 and 16 shards and either --proxy_store, a process of its own trains a UNet four
times as large as the demo's for two rounds of one step a shard (on one thread, without checkpoints
unless --checkpoints), and says how much memory it had resident at most. Beside it what the formula
of --dry_run makes of the waiting proxies, for this model and for Stable Diffusion 1.5.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from iet_sd.arguments import from_layers
from iet_sd.engine.plan import Estimate, estimate

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
SHARDS = (1, 2, 4, 8, 16)
STORES = ("memory", "disk")
LORA = {"train_mode": "lora", "rank": 4}


def wider_demo(folder: Path) -> Path:
    """The demo's pipeline with a new UNet of twice as many channels."""
    shutil.copytree(DEMO / "model", folder)
    settings = UNet2DConditionModel.load_config(folder, subfolder="unet")
    channels = [2 * channels for channels in settings["block_out_channels"]]
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(settings, block_out_channels=channels)
    unet.save_pretrained(folder / "unet")
    return folder


def stable_diffusion(folder: Path) -> Path:
    """The configs of a pipeline with the UNet of Stable Diffusion 1.5, and no weights."""
    shutil.copytree(DEMO / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.save_config(folder / "unet")
    return folder


def settings(model: Path, shards: int, store: str, **given: object) -> dict[str, object]:
    """Settings of a short run; all parts of the method, but with one shard that is not possible."""
    return {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(DEMO / "data"),
        "max_train_samples": 64,
        "resolution": 64,
        "train_batch_size": 1,
        "method": "iet_agc_plus" if shards > 1 else "iet_agc",
        "aggregate_every": 2,
        "num_shards": shards,
        "num_rounds": 2,
        "steps_per_round": 1,
        "proxy_store": store,
        "mixed_precision": "no",
        "report_to": "none",
        "seed": 0,
        **given,
    }


def peak(given: dict[str, object]) -> int:
    """The most bytes that a run of these settings had resident."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {**given, "output_dir": f"{folder}/output", "cache_dir": f"{folder}/cache"}
        run = subprocess.Popen(
            [sys.executable, ROOT / "train_iet_sd.py"]
            + [str(part) for name, value in flags.items() for part in (f"--{name}", value)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode:
            raise SystemExit(f"a run with K = {given['num_shards']} failed")
    return usage.ru_maxrss * 1024


def planned(model: Path, shards: int, store: str, **given: object) -> Estimate:
    """What --dry_run says of such a run."""
    return estimate(from_layers(settings(model, shards, store, **given)), 1, 1)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--shards", type=int, nargs="+", default=SHARDS)
    args = parser.parse_args()
    rounds = {"checkpointing_rounds": int(args.checkpoints)}
    with tempfile.TemporaryDirectory() as folder:
        mine = wider_demo(Path(folder) / "wider")
        original = stable_diffusion(Path(folder) / "original")
        n = planned(mine, 1, "memory").trainable
        found = planned(original, 1, "memory"), planned(original, 1, "memory", **LORA)
        print(
            f"Peak resident memory of a process that trains {n / 1e6:.1f} M parameters, K shards, "
            f"{'with' if args.checkpoints else 'without'} checkpoints (MiB; formula: waiting "
            f"proxies alone), and the formula for Stable Diffusion 1.5, full "
            f"({found[0].trainable / 1e6:.1f} M) and LoRA of rank {LORA['rank']} "
            f"({found[1].trainable / 1e6:.2f} M).\n"
        )
        print(
            "| K | memory | formula | disk | formula | SD 1.5 full: memory | disk "
            "| SD 1.5 LoRA: memory | disk |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for shards in args.shards:
            cells = []
            for store in STORES:
                cells += [
                    f"{peak(settings(mine, shards, store, **rounds)) / 2**20:.0f}",
                    f"{planned(mine, shards, store).host / 2**20:.0f}",
                ]
            for given, unit, name in (({}, 2**30, "GiB"), (LORA, 2**20, "MiB")):
                for store in STORES:
                    host = planned(original, shards, store, **given).host
                    cells.append(f"{host / unit:.1f} {name}")
            print(f"| {shards} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
