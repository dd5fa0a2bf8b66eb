"""The loss per sample: batch -> latents, text embeddings -> timesteps, noise -> UNet -> loss.

Every draw is derived from a sample's seed. Letters in shapes: B samples of a batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.training_utils import compute_dream_and_update_latents
from torch import Tensor

from iet_sd import diffusion
from iet_sd.errors import UserError
from iet_sd.models.adapter import is_trained
from iet_sd.models.family import SIZES
from iet_sd.models.loading import Components
from iet_sd.models.tokens import INPUT_IDS


class Objective:
    """The loss of a Stable Diffusion on each sample of a batch."""

    def __init__(
        self,
        components: Components,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        noise_offset: float = 0.0,
        snr_gamma: float | None = None,
        input_perturbation: float = 0.0,
        dream: float | None = None,
    ) -> None:
        """``autocast`` makes the context of a forward pass of the UNet (mixed precision).

        ``dream`` is DREAM's detail preservation, None without it. The other options are settings
        of training. Errors: `UserError` for DREAM of a model that predicts no noise.
        """
        self.components = components
        self.device = device
        self.autocast = autocast
        self.noise_offset = noise_offset
        self.snr_gamma = snr_gamma
        self.input_perturbation = input_perturbation
        self.dream = dream
        check_dream(dream, components.prediction_type)

    @property
    def forward_passes(self) -> int:
        """Passes of a sample through the UNet for one loss."""
        return 1 if self.dream is None else 2

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
        if self.input_perturbation:
            shift = diffusion.draw_noise(seeds_B, f"{purpose}/perturbation", latents.shape[1:])
            # The UNet is to predict the noise without it.
            noisy_latents = parts.noise_scheduler.add_noise(
                latents, noise + self.input_perturbation * shift.to(latents), timesteps
            )
        condition = self.encode_captions(batch)
        if self.dream is not None:
            # In a context of its own: not every PyTorch casts weights anew for the pass with
            # gradient where it has cast them for one without.
            with self.autocast():
                noisy_latents, target = compute_dream_and_update_latents(
                    lambda latents, t, _: parts.unet(latents, t, **condition),
                    parts.noise_scheduler,
                    timesteps,
                    noise,
                    noisy_latents,
                    target,
                    None,
                    self.dream,
                )
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

    def encode_captions(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the UNet is told of each sample besides timestep and noisy latents.

        With gradient, and in mixed precision, where text encoders are trained.
        """
        told = {
            name: batch[name].to(self.device, non_blocking=True)
            for name in (*INPUT_IDS, *SIZES)
            if name in batch
        }
        trained = any(map(is_trained, self.components.text_encoders))
        with self.autocast() if trained else torch.no_grad():
            return self.components.family.condition(self.components, told)

    def weight(self, loss_B: Tensor, timesteps_B: Tensor) -> Tensor:
        """The loss as it is trained on: weighted by min-SNR where asked for."""
        if self.snr_gamma is None:
            return loss_B
        timesteps = timesteps_B.to(loss_B.device)
        return loss_B * diffusion.snr_weights(
            self.components.noise_scheduler, timesteps, self.snr_gamma
        )


def check_dream(dream: float | None, prediction_type: str) -> None:
    """Errors: `UserError` for DREAM of a model that predicts no noise."""
    if dream is not None and prediction_type != "epsilon":
        raise UserError(
            f"--dream_training is for models that predict noise (epsilon); this one's prediction "
            f"type is {prediction_type}. Train it without."
        )
