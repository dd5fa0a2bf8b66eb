"""The demo model's VAE: a small ``AutoencoderKL`` that shrinks 4 times, and its training."""

import logging
import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

logger = logging.getLogger("demo.vae")
SIZE = 64
# Share of the steps that see quarters of the pictures.
CROPPED = 0.8


def augment_for_vae(rgba_B4HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random page colour, placement, colours and shading, so the VAE learns more than one style.

    (B, 4, H, W) in [0, 1] to (B, 3, H, W) in [-1, 1].
    """
    B = rgba_B4HW.shape[0]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(B, *shape, generator=generator) * (high - low) + low

    scale, angle = uniform(0.75, 1.25), uniform(-0.3, 0.3)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.stack(
        [
            torch.stack([flip * angle.cos() / scale, -angle.sin() / scale, uniform(-0.2, 0.2)], 1),
            torch.stack([flip * angle.sin() / scale, angle.cos() / scale, uniform(-0.2, 0.2)], 1),
        ],
        1,
    )
    moved = uniform(0, 1) < 0.6
    still = torch.eye(2, 3).expand(B, 2, 3)
    theta = torch.where(moved[:, None, None], theta, still)
    grid = F.affine_grid(theta, list(rgba_B4HW.shape), align_corners=False)
    rgba = F.grid_sample(rgba_B4HW, grid, mode="bilinear", align_corners=False)
    rgb, alpha = rgba[:, :3], rgba[:, 3:]

    # A colour matrix: identity for half of the images, a random mix of channels for the others.
    mix = torch.eye(3) + uniform(-0.6, 0.6, 3, 3) * (uniform(0, 1) < 0.5)[:, None, None]
    rgb = torch.einsum("bij,bjhw->bihw", mix, rgb)
    rows, columns = torch.linspace(-1, 1, SIZE)[:, None], torch.linspace(-1, 1, SIZE)[None, :]
    slope = (
        uniform(-0.35, 0.35, 1, 1, 1) * rows
        + uniform(-0.35, 0.35, 1, 1, 1) * columns
        + uniform(-0.35, 0.35, 1, 1, 1) * (rows**2 + columns**2)
    )
    shaded = (uniform(0, 1) < 0.6)[:, None, None, None]
    rgb = torch.where(shaded, rgb * (1 + slope), rgb).clamp(0, 1)
    page = torch.where((uniform(0, 1) < 0.25)[:, None], uniform(0, 1, 3), torch.ones(3))
    return (rgb * alpha + page[:, :, None, None] * (1 - alpha)) * 2 - 1


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute and squared error of the picture, its half and quarter sizes, and its edges.

    The squared term leads out of the absolute one's trap: a white page, the median of all emoji.
    """
    total = torch.zeros(())
    for level in range(3):
        error = output - target
        total = total + error.abs().mean() + error.square().mean()
        for dim in (-1, -2):
            total = total + (output.diff(dim=dim) - target.diff(dim=dim)).abs().mean()
        if level < 2:
            output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return total


def cosine_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up to ``peak``, then a cosine to a fiftieth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_vae(rgba_N4HW: torch.Tensor, steps: int, channels: int, seed: int) -> AutoencoderKL:
    """A VAE that shrinks 4 times: at 64 pixels, 8 times would leave too little of a picture."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=16,
        sample_size=SIZE,
    )
    with torch.no_grad():
        # Start with a narrow posterior: with std 1 the decoder learns to ignore the latents.
        vae.quant_conv.bias[channels:] = -6.0
    logger.info("VAE: %.2f M parameters", sum(p.numel() for p in vae.parameters()) / 1e6)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    bar = tqdm(range(steps), desc="VAE")
    running = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, 2e-3, warmup=50)
        index = torch.randint(len(rgba_N4HW), (16,), generator=generator)
        pixels = augment_for_vae(rgba_N4HW[index].float() / 255, generator)
        if step < CROPPED * steps:
            # Quarters cost a quarter, and teach a convolutional model nearly as much.
            top, left = torch.randint(SIZE // 2 + 1, (2,), generator=generator).tolist()
            pixels = pixels[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
        posterior = vae.encode(pixels).latent_dist
        loss = reconstruction_loss(vae.decode(posterior.sample(generator)).sample, pixels)
        loss = loss + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(vae.parameters()), 1.0)
        optimizer.step()
        running = 0.98 * running + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if step % 500 == 0:
            logger.info("VAE step %d loss %.4f", step, running)
    return vae.eval()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels_N3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior means and standard deviations of all images, unscaled."""
    parts = [vae.encode(batch).latent_dist for batch in pixels_N3HW.split(64)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
