"""The diffusion objective, one number per sample.

Ho et al. 2020 (arXiv 2006.11239) for noise prediction, Salimans & Ho 2022 (arXiv 2202.00512) for
v-prediction, Hang et al. 2023 (arXiv 2303.09556) for min-SNR weights. Shapes: B samples.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Generator, Tensor

from iet_sd.seeding import seed_for


def generators_for(seeds_B: Sequence[int], purpose: str) -> list[Generator]:
    """One CPU generator a sample, for the draws of one purpose."""
    return [Generator().manual_seed(seed_for(seed, purpose)) for seed in seeds_B]


def draw_timesteps(seeds_B: Sequence[int], purpose: str, num_train_timesteps: int) -> Tensor:
    """A uniform timestep a sample: int64 (B,)."""
    draw: Callable[[Generator], Tensor] = lambda generator: torch.randint(  # noqa: E731
        num_train_timesteps, (), generator=generator
    )
    return torch.stack([draw(generator) for generator in generators_for(seeds_B, purpose)])


def draw_noise(
    seeds_B: Sequence[int], purpose: str, shape: Sequence[int], offset: float = 0.0
) -> Tensor:
    """Standard normal noise (B, *shape), drawn on the CPU so that devices agree.

    ``offset`` adds one normal number times ``offset`` to each sample and channel, which lets the
    model learn brightness far from the mean.
    """
    noise = []
    for generator in generators_for(seeds_B, purpose):
        sample = torch.randn(tuple(shape), generator=generator)
        if offset:
            sample = sample + offset * torch.randn(shape[0], 1, 1, generator=generator)
        noise.append(sample)
    return torch.stack(noise)


def add_noise_and_target(
    noise_scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """The noisy latents at ``timesteps`` and what the UNet should say of them.

    The target is the noise (``epsilon``) or the velocity (``v_prediction``).
    """
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noisy_latents, noise_scheduler.get_velocity(latents, noise, timesteps)
    return noisy_latents, noise


def per_sample_loss(model_pred: Tensor, target: Tensor) -> Tensor:
    """Mean over all but the first dimension of the squared error, in float32: (B,)."""
    error = torch.nn.functional.mse_loss(model_pred.float(), target.float(), reduction="none")
    return error.mean(dim=list(range(1, error.ndim)))


def snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of each sample: min(snr, gamma) / snr, or / (snr + 1) for v: (B,).

    At snr = 0 (zero-terminal SNR) the first has the limit 1, where 0 / 0 would be NaN.
    """
    snr = compute_snr(noise_scheduler, timesteps)
    clipped = snr.clamp(max=gamma)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr, 1.0)
