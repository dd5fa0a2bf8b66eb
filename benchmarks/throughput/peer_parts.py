"""Where the time of a step of diffusers' own script goes, by `clocks`."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.optimizer import AcceleratedOptimizer

from benchmarks.throughput.clocks import REST, UNET, Clock, Profile, clocked

PEER_PARTS = (
    ("data", "accelerate.data_loader:DataLoaderShard.__iter__"),
    ("VAE, latents", "diffusers:AutoencoderKL.encode"),
    ("VAE, latents", "diffusers.models.autoencoders.vae:DiagonalGaussianDistribution.sample"),
    ("text", "transformers:CLIPTextModel.forward"),
    ("noise, loss", "diffusers:DDPMScheduler.add_noise"),
    ("noise, loss", "torch.nn.functional:mse_loss"),
    (UNET, "diffusers:UNet2DConditionModel.forward"),
    ("backward", "accelerate:Accelerator.backward"),
    ("optimizer", "accelerate:Accelerator.clip_grad_norm_"),
    ("optimizer", "accelerate.optimizer:AcceleratedOptimizer.step"),
    ("optimizer", "accelerate.optimizer:AcceleratedOptimizer.zero_grad"),
    ("optimizer", "accelerate.scheduler:AcceleratedScheduler.step"),
    ("logging", "accelerate:Accelerator.gather"),
    ("logging", "accelerate:Accelerator.log"),
)
"""As `parts.PARTS`, of what the script calls."""


def peer_profile(
    script: Path, argv: Sequence[str], warm_up: int, steps: int, batch_size: int
) -> Profile:
    """Run the script in this process with clocks, of ``steps`` after ``warm_up`` of them."""
    found, clock, done = Profile(trained=steps * batch_size, steps=steps), Clock(), 0

    def counted(self: AcceleratedOptimizer, *given: Any) -> Any:
        nonlocal done
        result = step(self, *given)
        done += 1
        if done == warm_up:
            clock.restart()
        if done == warm_up + steps:
            found.clock = clock.so_far()
        return result

    with clocked(PEER_PARTS, clock), clock.within(REST):
        step = AcceleratedOptimizer.step
        with (
            mock.patch.object(AcceleratedOptimizer, "step", counted),
            mock.patch.object(sys, "argv", [str(script), *argv]),
        ):
            runpy.run_path(str(script), run_name="__main__")
    return found
