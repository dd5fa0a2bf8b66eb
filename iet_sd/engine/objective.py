"""The loss per sample: batch -> latents, text embeddings -> timesteps, noise -> UNet -> loss.

Every draw is derived from a sample's seed. Letters in shapes: B samples of a batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import compute_dream_and_update_latents
from torch import Tensor

from iet_sd import diffusion
from iet_sd.devices import on_device
from iet_sd.errors import UserError
from iet_sd.models.adapter import is_trained
from iet_sd.models.family import ENCODED, SIZES
from iet_sd.models.loading import Components
from iet_sd.models.tokens import INPUT_IDS


class Prepared(NamedTuple):
    """What the UNet is given of a batch, and what it should say; on the device."""

    noisy_latents: Tensor
    """float32 (B, C, h, w)."""
    target: Tensor
    """float32 (B, C, h, w): noise or velocity."""
    timesteps: Tensor
    """int64 (B,)."""
    condition: dict[str, Any]
    """What it is told besides: tensors (B, ...), by name, some in a dictionary of their own."""
    samples: list[tuple[int, int]]
    """Index and timestep of each sample."""


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

    @property
    def backward_cost(self) -> float:
        """A backward pass through the UNet in forward passes, about.

        One for what it gives on to earlier layers, one for the gradient of its weights, as far as
        they are trained, and one for what checkpointing computes again.
        """
        unet = self.components.unet
        numbers = [(p.numel(), p.requires_grad) for p in unet.parameters()]
        trained = sum(number for number, requires_grad in numbers if requires_grad)
        share = trained / sum(number for number, _ in numbers)
        return 1 + share + unet.is_gradient_checkpointing

    def draw_timesteps(self, seeds_B: Sequence[int], purpose: str) -> Tensor:
        """Uniform timesteps, int64 (B,), on the CPU."""
        return diffusion.draw_timesteps(seeds_B, purpose, self.components.num_train_timesteps)

    def prepare(self, batch: dict[str, Tensor], timesteps_B: Tensor, purpose: str) -> Prepared:
        """All that the UNet is given of a batch, and what it should say, at these timesteps.

        ``purpose`` keeps the draws of a second pass apart from those of the first. Captions have a
        gradient where text encoders are trained and gradients are enabled.
        """
        parts, seeds_B = self.components, batch["seed"].tolist()
        timesteps = on_device(timesteps_B, self.device)
        latents = self.encode_images(batch, f"{purpose}/posterior")
        noise = on_device(
            diffusion.draw_noise(seeds_B, f"{purpose}/noise", latents.shape[1:], self.noise_offset),
            self.device,
        )
        noisy_latents, target = diffusion.add_noise_and_target(
            parts.noise_scheduler, latents, noise, timesteps
        )
        if self.input_perturbation:
            shift = diffusion.draw_noise(seeds_B, f"{purpose}/perturbation", latents.shape[1:])
            # The UNet is to predict the noise without it.
            noisy_latents = parts.noise_scheduler.add_noise(
                latents,
                noise + self.input_perturbation * on_device(shift, self.device),
                timesteps,
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
        samples = list(zip(batch["index"].tolist(), timesteps_B.tolist(), strict=True))
        return Prepared(noisy_latents, target, timesteps, condition, samples)

    def select(self, prepared: Prepared, batch: dict[str, Tensor], mask_B: Tensor) -> Prepared:
        """The samples of a prepared ``batch`` at which ``mask_B`` (on the CPU) is true.

        Captions are encoded again where text encoders are trained, as there may be no gradient.
        """
        (here,) = mask_B.nonzero(as_tuple=True)
        there = on_device(here, self.device)
        # As in `encode_captions`: no encoder need be there if captions come out of a cache.
        if ENCODED[0] not in batch and any(map(is_trained, self.components.text_encoders)):
            condition = self.encode_captions({name: t[here] for name, t in batch.items()})
        else:
            condition = _map(lambda tensors: tensors[0][there], [prepared.condition])
        return Prepared(
            prepared.noisy_latents[there],
            prepared.target[there],
            prepared.timesteps[there],
            condition,
            [prepared.samples[i] for i in here.tolist()],
        )

    def loss_of(self, prepared: Prepared) -> Tensor:
        """The squared error of the UNet on each sample: float32 (B,), with gradient if enabled."""
        with self.autocast():
            model_pred = self.components.unet(
                prepared.noisy_latents, prepared.timesteps, **prepared.condition, return_dict=False
            )[0]
        return diffusion.per_sample_loss(model_pred, prepared.target)

    def loss(self, batch: dict[str, Tensor], timesteps_B: Tensor, purpose: str) -> Tensor:
        """`loss_of` a batch as `prepare` makes it."""
        return self.loss_of(self.prepare(batch, timesteps_B, purpose))

    @torch.no_grad()
    def encode_images(self, batch: dict[str, Tensor], purpose: str) -> Tensor:
        """A sample of the VAE's posterior for each image, scaled: float32 (B, C, h, w).

        Of the posterior that a cache has, or of the image.
        """
        if "latent_mean" in batch:
            mean, std = (
                on_device(batch[name], self.device) for name in ("latent_mean", "latent_std")
            )
        else:
            mean, std = posterior(self.components.vae, batch["pixel_values"], self.device)
        sample = diffusion.draw_noise(batch["seed"].tolist(), purpose, mean.shape[1:])
        # In fp32 up to the UNet: in bf16 the first timesteps would be without noise.
        latents = mean.float() + std.float() * on_device(sample, self.device)
        return latents * self.components.vae_config["scaling_factor"]

    def encode_captions(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the UNet is told of each sample besides timestep and noisy latents.

        With gradient, and in mixed precision, where text encoders are trained.
        """
        told = {
            name: on_device(batch[name], self.device)
            for name in (*INPUT_IDS, *ENCODED, *SIZES)
            if name in batch
        }
        # Encoders whose work comes out of a cache need not even be loaded.
        trained = ENCODED[0] not in told and any(map(is_trained, self.components.text_encoders))
        with self.autocast() if trained else torch.no_grad():
            return self.components.family.condition(self.components, told)

    def weight(self, loss_B: Tensor, timesteps_B: Tensor) -> Tensor:
        """The loss as it is trained on: weighted by min-SNR where asked for."""
        if self.snr_gamma is None:
            return loss_B
        timesteps = on_device(timesteps_B, loss_B.device)
        return loss_B * diffusion.snr_weights(
            self.components.noise_scheduler, timesteps, self.snr_gamma
        )


def posterior(vae: AutoencoderKL, pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posteriors: (B, C, h, w), in its dtype."""
    found = vae.encode(on_device(pixels, device).to(vae.dtype)).latent_dist
    return found.mean, found.std


def join(parts: Sequence[Prepared]) -> list[Prepared]:
    """The same samples in as few batches as there are sizes of latents, by first appearance."""
    by_size: dict[torch.Size, list[Prepared]] = {}
    for part in parts:
        by_size.setdefault(part.noisy_latents.shape[1:], []).append(part)
    return [_concatenated(same) if len(same) > 1 else same[0] for same in by_size.values()]


def _concatenated(parts: Sequence[Prepared]) -> Prepared:
    noisy_latents, target, timesteps = (
        torch.cat(tensors) for tensors in list(zip(*parts, strict=True))[:3]
    )
    condition = _map(torch.cat, [part.condition for part in parts])
    return Prepared(
        noisy_latents, target, timesteps, condition, [s for part in parts for s in part.samples]
    )


def _map(function: Callable[[list[Tensor]], Tensor], conditions: list[Any]) -> Any:
    """``function`` of the tensors that are in the same place in each of ``conditions``."""
    if isinstance(conditions[0], dict):
        return {name: _map(function, [c[name] for c in conditions]) for name in conditions[0]}
    return function(conditions)


def check_dream(dream: float | None, prediction_type: str) -> None:
    """Errors: `UserError` for DREAM of a model that predicts no noise."""
    if dream is not None and prediction_type != "epsilon":
        raise UserError(
            f"--dream_training is for models that predict noise (epsilon); this one's prediction "
            f"type is {prediction_type}. Train it without."
        )
