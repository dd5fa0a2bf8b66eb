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
from demo.vae import SIZE, cosine_rate, encode_all, train_vae
from iet_sd.diffusion import per_sample_loss, snr_weights
from iet_sd.models.saving import load_in_fp32

logger = logging.getLogger("demo.pretrain")
TOKENS = 24
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


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """Stable Diffusion's UNet with three levels instead of four."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(32, 96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # of heads, as in SD 1.x
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text tower with three layers."""
    return CLIPTextModel(
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


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    pixels_N3HW: torch.Tensor,
    texts: list[str],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    save: Callable[[], None],
) -> None:
    """UNet and text encoder together, on noise prediction, with 10 % empty captions.

    Min-SNR weights, since a short training must not spend itself on the last bit of noise.

    ``save`` is called now and then and at the end, while the models hold their exponential
    moving averages.
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

    for name, model in (("UNet", unet), ("text encoder", text_encoder)):
        logger.info("%s: %.2f M parameters", name, sum(p.numel() for p in model.parameters()) / 1e6)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
    )
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    bar = tqdm(range(steps), desc="UNet")
    running = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, learning_rate)
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
            save()
            ema.restore(parameters)
    ema.copy_to(parameters)
    save()


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


def vae_stage(
    args: argparse.Namespace, rgba_N4HW: torch.Tensor, pixels_N3HW: torch.Tensor
) -> AutoencoderKL:
    """The VAE of an earlier run under ``--cache``, or a new one, with its scaling factor."""
    folder = args.cache / f"vae{args.latent_channels}"
    if folder.exists():
        vae = AutoencoderKL.from_pretrained(folder)
        vae.register_to_config(_name_or_path="")  # it would be saved
        return vae
    vae = train_vae(rgba_N4HW, args.vae_steps, args.latent_channels, args.seed)
    mean, std = encode_all(vae, pixels_N3HW)
    scale = (mean.var() + std.square().mean()).rsqrt().item()
    vae.register_to_config(scaling_factor=round(scale, 5))
    vae.save_pretrained(folder)
    return vae


def main() -> None:
    """Fetch the pictures, run the stages, save the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="npm packages, stage results")
    parser.add_argument("--output", type=Path, default=Path("demo/model"))
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=16000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="UNet's, at its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--continue_from", type=Path, help="pipeline folder made by this script, to train further"
    )
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

    if args.continue_from is not None:
        # With its own vocabulary: the order of equally frequent merges changes from run to run.
        tokenizer_folder = args.continue_from / "tokenizer"
        start = StableDiffusionPipeline.from_pretrained(args.continue_from)
        tokenizer, vae, unet, text_encoder = (
            start.tokenizer,
            start.vae,
            start.unet,
            start.text_encoder,
        )
        for part in (vae, unet):
            part.register_to_config(_name_or_path="")  # it would be saved
        text_encoder.name_or_path = ""
    else:
        tokenizer_folder = args.cache / "tokenizer"
        tokenizer = train_tokenizer(texts, tokenizer_folder)
        vae = vae_stage(args, rgba_N4HW, pixels_N3HW)
        unet = build_unet(args.latent_channels)
        text_encoder = build_text_encoder(tokenizer)
    error = (to_pixels(reconstruct(vae, pixels_N3HW[:256])) - pixels_N3HW[:256]).square().mean()
    logger.info("VAE: reconstruction PSNR %.2f dB", 10 * math.log10(4 / error.item()))
    train_unet(
        unet.train(),
        text_encoder.train(),
        vae,
        tokenizer,
        pixels_N3HW,
        texts,
        args.unet_steps,
        args.batch_size,
        args.learning_rate,
        args.seed,
        lambda: save_pipeline(args.output, vae, tokenizer, tokenizer_folder, unet, text_encoder),
    )


if __name__ == "__main__":
    main()
