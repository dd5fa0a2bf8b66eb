"""The loop of diffusers' text-to-image scripts written out, with draws at our addresses.

Nothing of ours but the order of the samples and the seeds of their draws.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from PIL import Image
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer

from iet_sd.data.shards import visits
from tests.engine.test_reduction import generators, normal
from tests.pipelines import RESOLUTION

TO_PIXELS = transforms.Compose(
    [
        transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.LANCZOS),
        transforms.CenterCrop(RESOLUTION),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    ]
)


class Plain:
    """A model trained by the loop: ``weights`` by name, and ``ema``, diffusers' own `EMAModel`."""

    def __init__(
        self, folder, images, rank=None, foreach=False, adamw=torch.optim.AdamW, **options
    ):
        self.images, self.options = images, options
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.noise_scheduler = DDPMScheduler.from_pretrained(
            folder, subfolder="scheduler", **options.get("scheduler", {})
        )
        if rank:
            self.unet.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                targets = ["to_k", "to_q", "to_v", "to_out.0"]
                lora = LoraConfig(
                    r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets
                )
                self.unet.add_adapter(lora)
        self.unet.train()
        self.parameters = {n: p for n, p in self.unet.named_parameters() if p.requires_grad}
        self.ema = EMAModel(self.parameters.values(), foreach=foreach)
        self.optimizer = adamw(
            self.parameters.values(),
            lr=options.get("learning_rate", 1e-3),
            betas=(0.9, 0.999),
            weight_decay=1e-2,
            eps=options.get("adam_epsilon", 1e-8),
        )
        self.lr_scheduler = get_scheduler(
            optimizer=self.optimizer, **options.get("lr", {"name": "constant"})
        )

    @property
    def weights(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def averages(self):
        return dict(zip(self.parameters, self.ema.shadow_params, strict=True))

    def train(self, steps, round=1, batch_size=4, batches_per_update=1):
        order = visits(0, round, 0, range(16))
        for _ in range(steps):
            for _ in range(batches_per_update):
                loss = self.loss([next(order) for _ in range(batch_size)])
                (loss / batches_per_update).backward()
            norm = self.options.get("max_grad_norm", 1.0)
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), norm)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
            self.ema.step(self.parameters.values())
        return self

    def loss(self, batch):
        """Of `Visit`s, as the scripts have it."""
        options, scheduler = self.options, self.noise_scheduler
        seeds = [visit.seed for visit in batch]
        pictures = [Image.open(self.images / f"{visit.index:02d}.png") for visit in batch]
        posterior = self.vae.encode(torch.stack([TO_PIXELS(p) for p in pictures])).latent_dist
        shape = posterior.mean.shape[1:]
        latents = posterior.mean + posterior.std * normal(seeds, "score/posterior", shape)
        latents = latents * self.vae.config.scaling_factor
        noise = normal(seeds, "score/noise", shape)
        if offset := options.get("noise_offset"):
            shifts = []
            for generator in generators(seeds, "score/noise"):
                torch.randn(shape, generator=generator)
                shifts.append(torch.randn(shape[0], 1, 1, generator=generator))
            noise = noise + offset * torch.stack(shifts)
        timesteps = torch.stack(
            [torch.randint(1000, (), generator=g) for g in generators(seeds, "score/timestep")]
        )
        seen = noise
        if perturbation := options.get("input_perturbation"):
            seen = noise + perturbation * normal(seeds, "score/perturbation", shape)
        noisy_latents = scheduler.add_noise(latents, seen, timesteps)
        v_prediction = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
        input_ids = self.tokenizer(
            [f"a cat or dog {visit.index}" for visit in batch],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            text = self.text_encoder(input_ids, return_dict=False)[0]
        if (power := options.get("dream")) is not None:
            # The paper's (arXiv 2312.00210) Algorithm 1: lambda = sqrt(1 - alpha_bar) ^ p.
            level = (1.0 - scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)) ** 0.5
            with torch.no_grad():
                error = (noise - self.unet(noisy_latents, timesteps, text).sample) * level**power
            noisy_latents, target = noisy_latents + level * error, target + error
        prediction = self.unet(noisy_latents, timesteps, text, return_dict=False)[0]
        if (gamma := options.get("snr_gamma")) is None:
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        alphas = scheduler.alphas_cumprod[timesteps]
        snr = (alphas**0.5 / (1.0 - alphas) ** 0.5) ** 2
        weights = snr.clamp(max=gamma) / (snr + 1 if v_prediction else snr)
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return (loss.mean(dim=list(range(1, loss.ndim))) * weights).mean()
