"""The VAE's encoder, a quarter of a step on the demo model, run once for each picture.

The VAE is frozen, and its posterior, of which training draws a sample at every visit, depends on
the pixels alone. A picture is always encoded by itself, so a latent does not depend on the batch it
comes in, nor on what was encoded before a run was stopped.
"""

import hashlib

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor


def encode_each_once() -> None:
    """Have every VAE of this process remember what it has encoded: for models that stay frozen."""
    encode, known = AutoencoderKL.encode, {}

    def moments(vae: AutoencoderKL, picture: Tensor) -> Tensor:
        key = id(vae), hashlib.sha256(picture.numpy().tobytes()).digest()
        if key not in known:
            known[key] = encode(vae, picture[None]).latent_dist.parameters[0]
        return known[key]

    def remembering(vae: AutoencoderKL, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        moments_B = torch.stack([moments(vae, picture) for picture in x.cpu().contiguous()])
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments_B))

    AutoencoderKL.encode = remembering
