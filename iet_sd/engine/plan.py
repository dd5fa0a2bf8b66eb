"""What a run will take, from settings and configs alone: shards, updates, memory, disk, time.

Models are counted without weights (`iet_sd.engine.sizes`); the speed of this machine is that of its
matrix products.
"""

import math
import time
from dataclasses import dataclass

import torch

from iet_sd.config import Config
from iet_sd.engine import sizes
from iet_sd.errors import UserError
from iet_sd.models.adapter import lora_pairs, make_trainable

# Convolutions and attention of a UNet reach between a half and a fifth of the speed of one large
# matrix product.
_EFFICIENCY = (0.5, 0.2)
_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def steps_per_round(config: Config, num_samples: int) -> int:
    """Steps of each proxy in a round: as set, or the run's updates spread over proxies and rounds.

    The updates of all proxies together are --max_train_steps, or --num_train_epochs passes.
    """
    method, training = config.method, config.training
    if method.steps_per_round is not None:
        return method.steps_per_round
    total = training.max_train_steps or (
        training.num_train_epochs * math.ceil(num_samples / training.samples_per_update)
    )
    return math.ceil(total / (method.num_shards * method.num_rounds))


def visits(config: Config, steps: int) -> int:
    """Looks at samples in a run of ``steps`` steps per round, at least: some may update nothing."""
    method = config.method
    return steps * method.num_rounds * method.num_shards * config.training.samples_per_update


def check_processes(config: Config, num_processes: int) -> None:
    """Errors: `UserError` for more processes than shards, which would leave some idle."""
    if num_processes > config.method.num_shards:
        raise UserError(
            f"{num_processes} processes for {config.method.num_shards} shards: a process trains "
            f"whole shards. Start with --num_processes {config.method.num_shards} or fewer, or use "
            "more --num_shards."
        )


def weight_dtype(mixed_precision: str | None) -> torch.dtype:
    """Precision of forward passes and of frozen weights."""
    return _DTYPE[mixed_precision or "no"]


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run on one process. Activations are an upper estimate."""

    trainable: int
    """Parameters that are trained."""
    model: int
    """Bytes of the UNet, all gradients and the moments of one proxy, on the device."""
    activations: int
    """Bytes kept for the backward pass of one batch."""
    frozen: int
    """Bytes of VAE and text encoders that are not trained, on the device."""
    encoding: int
    """Bytes at work while the images of a batch are encoded, before its activations are there."""
    host: int
    """Bytes of waiting proxies and of the mean, in the memory of the machine."""
    store: int
    """Bytes of waiting proxies on disk."""
    checkpoint: int
    """Bytes of the largest checkpoint of a round's end, by all processes."""
    within_round: int
    """Bytes that are saved in addition until the next one, at most."""
    flops: float
    """Arithmetic of all UNet passes, without skips and second passes."""

    def seconds(self, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
        """The shortest and longest time that the UNet's arithmetic should take."""
        speed = _matrix_speed(device, dtype)
        fast, slow = (self.flops / (speed * share) for share in _EFFICIENCY)
        return fast, slow


def estimate(config: Config, steps: int, num_processes: int) -> Estimate:
    """Count a run of ``steps`` steps per round on ``num_processes`` processes."""
    method, training = config.method, config.training
    dtype, batch = weight_dtype(training.mixed_precision), training.train_batch_size
    parts = sizes.meta_components(config.model, config.data.cache_dir)
    vae = parts.vae
    parameters = make_trainable(parts, config.model, seed=0)
    trainable = sum(p.numel() for p in parameters.values())
    # A square of the area of the largest size of images.
    sides = (math.sqrt(height * width) for height, width in config.data.buckets)
    resolution = 8 * math.ceil(max(sides) / 8)
    flops, saved = sizes.forward_cost(parts, parts.latent_size(resolution))
    image = torch.empty(1, vae.config.in_channels, resolution, resolution, device="meta")
    vae_bytes = parts.family.vae_dtype(vae.config, dtype).itemsize
    texts = sizes.frozen_parameters(*parts.text_encoders)
    waiting = math.ceil(method.num_shards / num_processes)
    total = steps * method.num_rounds * waiting * training.samples_per_update
    keeps, averages = (method.proxy_optimizer == name for name in ("keep", "average"))
    # In units of the trained weights: what a proxy holds at its turn, while it waits, and what all
    # share. Of moments in 8 bits the scales are left out, a sixtieth of them.
    moments, ema = 0.5 if training.use_8bit_adam else 2, int(training.use_ema)
    whole = 1 + moments + ema
    own = whole if method.aggregate_every > 1 else moments * keeps
    shared = 1 + ema + 2 * averages + (method.outer_momentum > 0)
    on_disk = training.proxy_store == "disk"
    # Of the others, of the one that leaves or enters, and a mean beside what is shared.
    host = (0 if on_disk else own * (waiting - 1)) + whole + shared + 1 + ema + 2 * averages
    on_device = 2 + moments + ema * (not training.offload_ema)
    averages_of_products = 1 + ema * (config.model.lora_aggregation == "product")
    return Estimate(
        trainable=trainable,
        # fp32 weights, gradients, moments and average of what is trained.
        model=int(4 * trainable * on_device) + dtype.itemsize * sizes.frozen_parameters(parts.unet),
        activations=saved * batch * dtype.itemsize // 4,
        frozen=vae_bytes * sizes.frozen_parameters(vae) + dtype.itemsize * texts,
        encoding=sizes.peak_of(lambda: vae.encode(image)) * batch * vae_bytes // 4,
        host=int(4 * trainable * host) + averages_of_products * _products(config, parameters),
        store=int(4 * trainable * own * waiting) if on_disk else 0,
        checkpoint=int(4 * trainable * (own * method.num_shards + shared)),
        within_round=int(4 * trainable * whole * method.num_shards),
        # Forward, and twice that backward; checkpointing goes forward once more, as does DREAM.
        flops=(3 + config.model.gradient_checkpointing + training.dream_training) * flops * total,
    )


def checkpoints_kept(config: Config) -> int:
    """Checkpoints that are there at the end of a run."""
    every, limit = config.training.checkpointing_rounds, config.training.checkpoints_total_limit
    written = math.ceil(config.method.num_rounds / every) if every else 0
    return min(limit or written, written)


def _products(config: Config, parameters: dict[str, torch.nn.Parameter]) -> int:
    """Bytes of what `AdapterMean` keeps of the products BA."""
    found = 0
    for a, b in lora_pairs(parameters):
        A, B = parameters[a].flatten(1), parameters[b].flatten(1)
        factors = config.method.num_shards * (A.numel() + B.numel())
        found += 4 * min(factors, A.shape[1] * B.shape[0])
    return found


def describe(
    config: Config, shards: list[int], steps: int, found: Estimate, device: torch.device
) -> str:
    """The plan of a run, for people."""
    method, training = config.method, config.training
    updates = steps * method.num_rounds
    unit = "updates" if method.step_unit == "update" else "batches scored"
    on_device = found.model + found.frozen + max(found.activations, found.encoding)
    kept = checkpoints_kept(config)
    # While one is written, the one that it replaces is still there.
    saved = (kept + 1) * found.checkpoint + found.within_round if kept else 0
    fast, slow = found.seconds(device, weight_dtype(training.mixed_precision))
    lines = [f"{name}: {value}" for name, value in config.as_dict().items()]
    return "\n".join(
        [
            *lines,
            "",
            f"samples:   {sum(shards)} in {len(shards)} shards of {', '.join(map(str, shards))}",
            f"length:    {method.num_rounds} rounds of {steps} {unit} per shard: {updates} for "
            f"each proxy, {updates * len(shards)} together",
            f"trainable: {found.trainable / 1e6:.2f} M parameters",
            f"memory:    about {gib(on_device)} on {device.type} (UNet with gradients and moments "
            f"{gib(found.model)}, its activations at most {gib(found.activations)}; VAE and text "
            f"encoders {gib(found.frozen)}, encoding a batch {gib(found.encoding)}), "
            f"{gib(found.host)} of main memory for waiting proxies and their mean; Python and its "
            "libraries take about 1.3 GiB of it more",
            f"disk:      {gib(saved)} for {kept} checkpoints of at most {gib(found.checkpoint)}, "
            f"one being written and steps within a round; {gib(found.store)} for waiting proxies",
            f"time:      UNet {_duration(fast)} to {_duration(slow)} on this {device.type}",
        ]
    )


def _matrix_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product, the best of a few."""
    side = 4096 if device.type == "cuda" else 1024
    # CPUs without 16-bit units take a second for what a GPU does in a millisecond.
    dtype = dtype if device.type == "cuda" else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        (matrix @ matrix).sum().item()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def gib(size: float) -> str:
    """For people."""
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
