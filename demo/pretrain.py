"""Pre-train the bundled demo model: a small Stable Diffusion that draws Noto emoji.

    python -m demo.pretrain --cache DIR --output demo/model

Every part is the real class (``AutoencoderKL``, ``UNet2DConditionModel``, ``CLIPTextModel``,
``CLIPTokenizer``) at a small size; the result is an ordinary pipeline folder. Three stages:
tokenizer, VAE (skipped when it already lies under ``--cache``), then UNet with text encoder, saved
every 1,000 steps. The demo's own images (Fluent style) are never seen here. Two hours on 2 cores.
"""

import argparse
import copy
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo import emoji
from demo.make_data import wanted
from demo.pictures import reconstruct, to_pixels
from iet_sd.diffusion import per_sample_loss, snr_weights
from iet_sd.models.saving import load_in_fp32

logger = logging.getLogger("demo.pretrain")
SIZE = 64
TOKENS = 24
# Share of the VAE's steps that see quarters of the pictures.
CROPPED = 0.8
SAVE_EVERY = 1000
# As Stable Diffusion 1.x.
NOISE_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def train_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP-format byte-pair tokenizer (lower case, ``</w>`` word ends) learnt from ``texts``."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    bpe.train_from_iterator(
        [text.lower() for text in texts],
        trainers.BpeTrainer(
            vocab_size=1600,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    # CLIP's layout: bytes, the same bytes at a word end, one entry a merge, then the two specials.
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    base = sorted(alphabet)
    entries = [*base, *(b + "</w>" for b in base), *(m.replace(" ", "") for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(entries))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


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


def train_unet(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    pixels_N3HW: torch.Tensor,
    texts: list[str],
    steps: int,
    batch_size: int,
    seed: int,
    save: Callable[[UNet2DConditionModel, CLIPTextModel], None],
) -> None:
    """UNet and text encoder together, on noise prediction, with 10 % empty captions.

    Min-SNR weights, since a short training must not spend itself on the last bit of noise.

    ``save`` is given their exponential moving averages, now and then and at the end.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # Shifted and mirrored copies: the VAE's posterior does not commute with either.
    views = [pixels_N3HW, pixels_N3HW.flip(-1)]
    for dy, dx in ((2, 0), (-2, 0), (0, 2), (0, -2)):
        views.append(
            torch.roll(F.pad(pixels_N3HW, (4, 4, 4, 4), value=1.0), (dy, dx), (2, 3))[
                :, :, 4:-4, 4:-4
            ]
        )
    posteriors = [encode_all(vae, view) for view in views]
    mean = torch.stack([m for m, _ in posteriors]) * vae.config.scaling_factor
    std = torch.stack([s for _, s in posteriors]) * vae.config.scaling_factor
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids
    empty = tokenizer(
        "", padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids

    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(32, 96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # of heads, as in SD 1.x
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, model in (("UNet", unet), ("text encoder", text_encoder)):
        logger.info("%s: %.2f M parameters", name, sum(p.numel() for p in model.parameters()) / 1e6)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    bar = tqdm(range(steps), desc="UNet")
    running = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, 1e-3)
        index = torch.randint(len(texts), (batch_size,), generator=generator)
        view = torch.randint(len(views), (batch_size,), generator=generator)
        latents = mean[view, index]
        latents = latents + std[view, index] * torch.randn(latents.shape, generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        input_ids = torch.where(dropped[:, None], empty, tokens[index])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        prompt_embeds = text_encoder(input_ids)[0]
        model_pred = unet(noisy_latents, timesteps, prompt_embeds).sample
        weight_B = snr_weights(noise_scheduler, timesteps, gamma=5.0)
        loss = (per_sample_loss(model_pred, noise) * weight_B).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        running = 0.99 * running + 0.01 * loss.item() if step else loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if step % 500 == 0:
            logger.info("UNet step %d loss %.4f", step, running)
        if step and step % SAVE_EVERY == 0:
            ema.store(parameters)
            ema.copy_to(parameters)
            save(unet, text_encoder)
            ema.restore(parameters)
    ema.copy_to(parameters)
    save(unet, text_encoder)


def save_pipeline(
    output: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    tokenizer_folder: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
) -> None:
    """Save an ordinary pipeline folder in fp16, which halves the bundle."""
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    StableDiffusionPipeline(
        **{name: copy.deepcopy(part).half() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            **NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output)
    load_in_fp32(output)
    for name in ("vocab.json", "merges.txt"):  # what transformers before 5 reads
        shutil.copyfile(tokenizer_folder / name, output / "tokenizer" / name)


def main() -> None:
    """Fetch the pictures, run the stages, save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="npm packages, stage results")
    parser.add_argument("--output", type=Path, default=Path("demo/model"))
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=16000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    emoji.fetch(args.cache, "names", "noto")

    everything = emoji.load(args.cache, "noto")
    # The UNet goes without flags and the skin tones between, as the data of the demo does.
    noto = [e for e in everything if wanted(e)]
    logger.info("%d Noto emoji, %d for the UNet", len(everything), len(noto))
    pictures = [Image.open(e.path).convert("RGBA").resize((SIZE, SIZE)) for e in everything]
    rgba = np.stack([np.asarray(picture) for picture in pictures])
    rgba_N4HW = torch.from_numpy(rgba).permute(0, 3, 1, 2)
    pixels_N3HW = to_pixels([e.picture(SIZE) for e in noto])
    texts = [e.text for e in noto]

    tokenizer_folder = args.cache / "tokenizer"
    tokenizer = train_tokenizer(texts, tokenizer_folder)
    vae_folder = args.cache / f"vae{args.latent_channels}"
    if vae_folder.exists():
        vae = AutoencoderKL.from_pretrained(vae_folder)
        vae.register_to_config(_name_or_path="")  # it would be saved
    else:
        vae = train_vae(rgba_N4HW, args.vae_steps, args.latent_channels, args.seed)
        mean, std = encode_all(vae, pixels_N3HW)
        scale = (mean.var() + std.square().mean()).rsqrt().item()
        vae.register_to_config(scaling_factor=round(scale, 5))
        vae.save_pretrained(vae_folder)
    error = (to_pixels(reconstruct(vae, pixels_N3HW[:256])) - pixels_N3HW[:256]).square().mean()
    logger.info("VAE: reconstruction PSNR %.2f dB", 10 * math.log10(4 / error.item()))
    if not args.unet_steps:
        return
    train_unet(
        vae,
        tokenizer,
        pixels_N3HW,
        texts,
        args.unet_steps,
        args.batch_size,
        args.seed,
        lambda unet, text_encoder: save_pipeline(
            args.output, vae, tokenizer, tokenizer_folder, unet, text_encoder
        ),
    )


if __name__ == "__main__":
    main()
