"""The loss per sample: batch -> latents, text embeddings -> timesteps, noise -> UNet -> loss.

Every draw is derived from a sample's seed. Letters in shapes: B samples of a batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from iet_sd import diffusion
from iet_sd.models.loading import Components


class Objective:
    """The loss of a Stable Diffusion on each sample of a batch."""

    def __init__(
        self,
        components: Components,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        noise_offset: float = 0.0,
        snr_gamma: float | None = None,
    ) -> None:
        """``autocast`` makes the context of the UNet's forward pass (mixed precision)."""
        self.components = components
        self.device = device
        self.autocast = autocast
        self.noise_offset = noise_offset
        self.snr_gamma = snr_gamma

    def draw_timesteps(self, seeds_B: Sequence[int], purpose: str) -> Tensor:
        """Uniform timesteps, int64 (B,), on the CPU."""
        return diffusion.draw_timesteps(seeds_B, purpose, self.components.num_train_timesteps)

    def loss(self, batch: dict[str, Tensor], timesteps_B: Tensor, purpose: str) -> Tensor:
        """The squared error of the UNet on each sample: float32 (B,), with gradient if enabled.

        ``purpose`` keeps the draws of a second pass apart from those of the first.
        """
        parts, seeds_B = self.components, batch["seed"].tolist()
        timesteps = timesteps_B.to(self.device)
        latents = self.encode_images(batch, f"{purpose}/posterior")
        noise = diffusion.draw_noise(
            seeds_B, f"{purpose}/noise", latents.shape[1:], self.noise_offset
        ).to(latents)
        noisy_latents, target = diffusion.add_noise_and_target(
            parts.noise_scheduler, latents, noise, timesteps
        )
        condition = self.encode_captions(batch)
        with self.autocast():
            model_pred = parts.unet(noisy_latents, timesteps, **condition, return_dict=False)[0]
        return diffusion.per_sample_loss(model_pred, target)

    @torch.no_grad()
    def encode_images(self, batch: dict[str, Tensor], purpose: str) -> Tensor:
        """A sample of the VAE's posterior for each image, scaled: float32 (B, C, h, w)."""
        vae = self.components.vae
        pixels = batch["pixel_values"].to(self.device, vae.dtype, non_blocking=True)
        posterior = vae.encode(pixels).latent_dist
        sample = diffusion.draw_noise(batch["seed"].tolist(), purpose, posterior.mean.shape[1:])
        # In fp32 up to the UNet: in bf16 the first timesteps would be without noise.
        latents = posterior.mean.float() + posterior.std.float() * sample.to(self.device)
        return latents * vae.config.scaling_factor

    @torch.no_grad()
    def encode_captions(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the UNet is told of each sample besides timestep and noisy latents."""
        input_ids = batch["input_ids"].to(self.device, non_blocking=True)
        embeddings = self.components.text_encoder(input_ids, return_dict=False)[0]
        return {"encoder_hidden_states": embeddings}

    def weight(self, loss_B: Tensor, timesteps_B: Tensor) -> Tensor:
        """The loss as it is trained on: weighted by min-SNR where asked for."""
        if self.snr_gamma is None:
            return loss_B
        timesteps = timesteps_B.to(loss_B.device)
        return loss_B * diffusion.snr_weights(
            self.components.noise_scheduler, timesteps, self.snr_gamma
        )
