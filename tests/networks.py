"""Networks of every kind that an embedder is made of: real ones, small, of random weights."""

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from tests.pipelines import TOKENS, tiny_pipeline

EDGE = 32
"""Pixels to which the processors of CLIP and DINOv2 scale the shorter edge."""


def save_script(network: nn.Module, path: Path) -> Path:
    """Save a network as TorchScript; returns the path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(network).save(path)
    return path


def tiny_convolution() -> nn.Module:
    """Images of any size, (B, 3, H, W), to (B, 7)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 4, 3, stride=8)
        pool = (nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(convolution, *pool, nn.Linear(4, 7)).eval()


def tiny_clip(folder: Path) -> Path:
    """Save a CLIP of 8 features, its image processor and tokenizer; returns the folder."""
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline(folder / "pipeline") / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": EDGE, "patch_size": 16}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=EDGE)
    processor.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder / "clip"


def tiny_dinov2(folder: Path) -> Path:
    """Save a DINOv2 of 16 features and its image processor; returns the folder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(**sizes, image_size=28, patch_size=14)
        Dinov2Model(config).save_pretrained(folder / "dinov2")
    processor = BitImageProcessor(size={"shortest_edge": EDGE}, crop_size=28)
    processor.save_pretrained(folder / "dinov2")
    return folder / "dinov2"


def random_inception(path: Path) -> nn.Module:
    """Save weights as torch-fidelity publishes them (the old format); returns their network."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Random(module.FeatureExtractorInceptionV3):
        """As it is made, whatever the file says."""

        def load_state_dict(self, *_):
            pass

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Random("inception", ["2048"], feature_extractor_weights_path=path)
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    return network
