"""Draw the README's pictures of the demo model.

    python -m demo.pictures

``docs/vae.png``: held-out Fluent emoji above their reconstructions by the VAE.
``docs/demo-before.png``: the demo's validation prompts by the demo model as it is bundled.
"""

from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from iet_sd import arguments
from iet_sd.sampling import grid, sample

DOCS = Path("docs")


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """RGB images to (N, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels_N3HW: torch.Tensor) -> list[Image.Image]:
    """The images after encoding (mean) and decoding."""
    output = vae.decode(vae.encode(pixels_N3HW).latent_dist.mean).sample
    array = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in array]


def main() -> None:
    """Write both pictures."""
    DOCS.mkdir(exist_ok=True)
    settings = arguments.load(["--config", "configs/demo.yaml"])
    pipeline = StableDiffusionPipeline.from_pretrained("demo/model")
    pipeline.set_progress_bar_config(disable=True)
    test = load_dataset("demo/data", split="test")
    originals = test[: len(test) : len(test) // 12]["image"][:12]
    copies = reconstruct(pipeline.vae, to_pixels(originals))
    titles = ["held-out Fluent emoji", "after the VAE"]
    grid([originals, copies], titles).save(DOCS / "vae.png")
    training = settings.training
    rows = sample(
        pipeline,
        training.validation_prompts,
        training.num_validation_images,
        training.seed,
        settings.data.resolution,
        training.validation_inference_steps,
        training.validation_guidance_scale,
    )
    grid(rows, training.validation_prompts).save(DOCS / "demo-before.png")


if __name__ == "__main__":
    main()
