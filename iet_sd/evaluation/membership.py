"""Does the model denoise its training images better than new ones of their kind?

Membership inference by loss (Yeom et al. 2018, arXiv 1709.01604), here the loss of denoising, with
the true positive rate at a low false positive rate as the measure (Carlini et al. 2022, arXiv
2112.03570). No image is drawn. It holds where training and held-out images are splits of one data
set. Letters in shapes: N images, S strata of timesteps.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from iet_sd import diffusion
from iet_sd.data.transforms import view
from iet_sd.errors import UserError
from iet_sd.evaluation.images import ImageSet
from iet_sd.evaluation.statistics import Estimate, bootstrap
from iet_sd.models.family import family_of, whole_image
from iet_sd.sampling import evaluating
from iet_sd.seeding import seed_for


def stratified_timesteps(count: int, num_train_timesteps: int) -> list[int]:
    """The middles of ``count`` equal parts of the range 0 to ``num_train_timesteps``."""
    return [int((s + 0.5) * num_train_timesteps / count) for s in range(count)]


@torch.no_grad()
def stratified_losses(
    pipeline: DiffusionPipeline,
    images: ImageSet,
    captions: Sequence[str],
    timesteps: Sequence[int],
    seed: int,
    resolution: int,
    batch_size: int = 8,
    progress: str = "",
) -> np.ndarray:
    """Denoising loss of each image with its caption, at each of the timesteps: float64 (N, S).

    All is fixed: latents are the mean of the VAE's, and the noise of an image depends on ``seed``,
    its id and the place s among the timesteps. So a loss depends neither on the other images nor
    on ``batch_size``, and two models see the same noise.
    progress: title of a progress bar; empty for none.
    Errors: `UserError` for a loss that is not finite.
    """
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    loss_NS = np.empty((len(images), len(timesteps)))
    starts = range(0, len(images), batch_size)
    with evaluating(pipeline.unet):
        for start in tqdm(starts, desc=progress, disable=not progress):
            rows = range(start, min(start + batch_size, len(images)))
            seeds_B = [seed_for(seed, "membership", images.ids[n]) for n in rows]
            latents = _latents(pipeline, images, rows, resolution)
            condition = _condition(pipeline, [captions[n] for n in rows], resolution)
            for s, timestep in enumerate(timesteps):
                noise = diffusion.draw_noise(seeds_B, str(s), latents.shape[1:]).to(latents)
                timesteps_B = torch.full((len(rows),), timestep, device=latents.device)
                noisy_latents, target = diffusion.add_noise_and_target(
                    noise_scheduler, latents, noise, timesteps_B
                )
                model_pred = pipeline.unet(
                    noisy_latents.to(pipeline.unet.dtype), timesteps_B, **condition
                ).sample
                loss_NS[rows, s] = diffusion.per_sample_loss(model_pred, target).cpu()
    _check_finite(loss_NS, images, timesteps)
    return loss_NS


def loss_terms(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What a model's losses are made of beside its UNet and its text encoders.

    Only losses of models that share it are of one kind: what is predicted, of which noise levels,
    in which latents. As JSON.
    """
    noise_scheduler, vae = DDPMScheduler.from_config(pipeline.scheduler.config), pipeline.vae
    weights = [tensor for _, tensor in sorted(vae.state_dict().items())]
    return {
        "prediction_type": noise_scheduler.config.prediction_type,
        "noise_levels": _digest([noise_scheduler.alphas_cumprod]),
        "vae": _digest([torch.tensor(vae.config.scaling_factor), *weights]),
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def loss_gap(train_NS: np.ndarray, heldout_NS: np.ndarray, **options: Any) -> Estimate:
    """How much more loss held-out images have than training images, on average; 0 if unlearned.

    ``options`` go to `bootstrap`, which resamples whole images.
    """
    return bootstrap(
        lambda train, heldout: heldout.mean() - train.mean(),
        train_NS.mean(axis=1),
        heldout_NS.mean(axis=1),
        **options,
    )


def membership_auc(train_N: np.ndarray, heldout_N: np.ndarray) -> float:
    """Chance that of a training and a held-out image the training one has the lower loss.

    0.5: the loss tells nothing; ties count half. It is the area under the ROC curve.
    """
    ranks = rankdata(np.concatenate([heldout_N, train_N]))[: len(heldout_N)]
    u = ranks.sum() - len(heldout_N) * (len(heldout_N) + 1) / 2
    return float(u / (len(train_N) * len(heldout_N)))


def tpr_at_fpr(train_N: np.ndarray, heldout_N: np.ndarray, fpr: float = 0.01) -> float:
    """Share of training images told by a loss that at most ``fpr`` of held-out ones are below.

    fpr: from 0 to below 1. Of fewer than 1 / fpr held-out images none may be below.
    """
    allowed = int(fpr * len(heldout_N) + 1e-9)
    return float((train_N < np.sort(heldout_N)[allowed]).mean())


def _condition(
    pipeline: DiffusionPipeline, captions_B: Sequence[str], resolution: int
) -> dict[str, Any]:
    """What the UNet is told of images of these captions, as if they were not cropped."""
    family = family_of(pipeline)
    batch = family.tokenize(pipeline).batch(captions_B) | whole_image(resolution, len(captions_B))
    return family.condition(pipeline, {k: t.to(pipeline.device) for k, t in batch.items()})


def _latents(pipeline: DiffusionPipeline, images: ImageSet, rows: range, resolution: int) -> Tensor:
    """float32 latents of some images, resized and cropped at the centre."""
    vae = pipeline.vae
    pixels = torch.stack(
        [
            view(
                images[n],
                size=(resolution, resolution),
                center_crop=True,
                random_flip=False,
                interpolation="lanczos",
            ).pixel_values
            for n in rows
        ]
    )
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float() * vae.config.scaling_factor


def _check_finite(loss_NS: np.ndarray, images: ImageSet, timesteps: Sequence[int]) -> None:
    bad = np.argwhere(~np.isfinite(loss_NS))
    if len(bad):
        names = ", ".join(f"{images.ids[n]} (t={timesteps[s]})" for n, s in bad[:5])
        raise UserError(
            f"The loss is not finite for {len(bad)} of {loss_NS.size} pairs of image and timestep: "
            f"{names}. Evaluate with --mixed_precision no; if it was, the model is broken."
        )
