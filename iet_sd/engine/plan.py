"""What a run will take, from settings and configs alone: shards, updates, memory, time.

The UNet is built without weights (on the meta device), its arithmetic counted and the tensors that
autograd would keep summed up; the speed of this machine is that of its matrix products.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from iet_sd.config import Config
from iet_sd.errors import UserError
from iet_sd.models.adapter import make_trainable
from iet_sd.models.loading import Components

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
    """Bytes of the UNet, its gradients and the moments of one proxy, on the device."""
    activations: int
    """Bytes kept for the backward pass of one batch."""
    host: int
    """Bytes of waiting proxies and of the mean, in the memory of the machine."""
    flops: float
    """Arithmetic of all UNet passes, without skips and second passes."""

    def seconds(self, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
        """The shortest and longest time that the UNet's arithmetic should take."""
        speed = _matrix_speed(device, dtype)
        fast, slow = (self.flops / (speed * share) for share in _EFFICIENCY)
        return fast, slow


def estimate(config: Config, steps: int, num_processes: int) -> Estimate:
    """Count a run of ``steps`` steps per round on ``num_processes`` processes."""
    dtype = weight_dtype(config.training.mixed_precision)
    unet = _meta_unet(config)
    parts = Components(None, None, None, unet, None, "", None)
    parameters = make_trainable(parts, config.model, seed=0)
    trainable = sum(p.numel() for p in parameters.values())
    frozen = sum(p.numel() for p in unet.parameters()) - trainable
    size = config.data.resolution // _shrinkage(config)
    flops, saved = _count(unet, size)
    method, batch = config.method, config.training.train_batch_size
    waiting = math.ceil(method.num_shards / num_processes)
    total = steps * method.num_rounds * waiting * config.training.samples_per_update
    return Estimate(
        trainable=trainable,
        # fp32 weights, gradients and two moments of what is trained.
        model=16 * trainable + dtype.itemsize * frozen,
        activations=saved * batch * dtype.itemsize // 4,
        # Weights and two moments of each waiting proxy, the mean and the last average.
        host=4 * trainable * (3 * (waiting if waiting > 1 else 0) + 2),
        # Forward, and twice that backward; checkpointing goes forward once more.
        flops=(4 if config.model.gradient_checkpointing else 3) * flops * total,
    )


def describe(
    config: Config, sizes: list[int], steps: int, found: Estimate, device: torch.device
) -> str:
    """The plan of a run, for people."""
    method, training = config.method, config.training
    updates = steps * method.num_rounds
    unit = "updates" if method.step_unit == "update" else "batches scored"
    fast, slow = found.seconds(device, weight_dtype(training.mixed_precision))
    lines = [f"{name}: {value}" for name, value in config.as_dict().items()]
    return "\n".join(
        [
            *lines,
            "",
            f"samples:   {sum(sizes)} in {len(sizes)} shards of {', '.join(map(str, sizes))}",
            f"length:    {method.num_rounds} rounds of {steps} {unit} per shard: {updates} for "
            f"each proxy, {updates * len(sizes)} together",
            f"trainable: {found.trainable / 1e6:.2f} M parameters",
            f"memory:    about {_gib(found.model + found.activations)} on {device.type} for the "
            f"UNet (weights, gradients, moments {_gib(found.model)}; activations at most "
            f"{_gib(found.activations)}), {_gib(found.host)} of main memory for waiting proxies",
            f"time:      UNet {_duration(fast)} to {_duration(slow)} on this {device.type}",
        ]
    )


def _meta_unet(config: Config) -> UNet2DConditionModel:
    """The UNet's architecture without weights."""
    settings = _part_config(UNet2DConditionModel, "unet", config)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(settings).requires_grad_(False)


def _shrinkage(config: Config) -> int:
    """Pixels per latent along an edge."""
    settings = _part_config(AutoencoderKL, "vae", config)
    return 2 ** (len(settings["block_out_channels"]) - 1)


def _part_config(cls: type[ConfigMixin], part: str, config: Config) -> dict[str, Any]:
    """The config file of a part of the pipeline, from its folder or the Hub.

    Errors: `UserError` if it cannot be had.
    """
    name = config.model.pretrained_model_name_or_path
    folder = Path(name).expanduser()
    try:
        return cls.load_config(
            folder if folder.is_dir() else name,
            subfolder=part,
            revision=config.model.revision,
            cache_dir=config.data.cache_dir,
        )
    except OSError as error:
        raise UserError(
            f"{name}: the config of its {part} cannot be read ({str(error).splitlines()[0]}). "
            "Check the name and the connection, or give the path of a pipeline folder."
        ) from error


def _count(unet: UNet2DConditionModel, size: int) -> tuple[int, int]:
    """Arithmetic (FLOP) of one sample's forward pass, and bytes of fp32 kept for the backward."""
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []  # so that no storage's address is used again
    text = torch.empty(1, 77, unet.config.cross_attention_dim, device="meta")
    latents = torch.empty(1, unet.config.in_channels, size, size, device="meta")
    unchanged: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks(note, unchanged)
    with FlopCounterMode(display=False) as counter, hooks:
        unet(latents, torch.zeros(1, device="meta"), text)
    return counter.get_total_flops(), sum(kept.values())


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


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
