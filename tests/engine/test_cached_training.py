"""Encoded once: the same training as encoded in every visit."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.latents import Latents, Texts, Variants
from iet_sd.data.shards import Visit, split
from iet_sd.data.sources import load_source
from iet_sd.engine.beforehand import choose
from iet_sd.engine.caching import cached_images
from iet_sd.engine.objective import Objective
from iet_sd.engine.rounds import Trainer
from iet_sd.engine.state import RoundDone
from iet_sd.models.adapter import lora_pairs
from iet_sd.models.loading import load_components
from tests.engine.preparing import FITTING, prepare


def train(config):
    """Final weights and what was counted, as the command line trains."""
    components, parameters, dataset = prepare(config)
    shard_of_N = split(dataset.source.groups, config.method.num_shards, 0, "seeded")
    trainer = Trainer(
        config=config,
        seed=0,
        steps_per_round=3,
        objective=Objective(components, torch.device("cpu"), nullcontext),
        dataset=dataset,
        parameters=parameters,
        lora_pairs=lora_pairs(parameters),
        device=torch.device("cpu"),
    )
    events = list(trainer.run(trainer.start(shard_of_N)))
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    rounds = [event for event in events if isinstance(event, RoundDone)]
    return weights, rounds, dataset


def decisions(rounds):
    return [
        (event.counts.scored, event.counts.skipped, event.counts.augmented, done.moved_K)
        for done in rounds
        for event in done.shards
    ]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("sd1", {"method": "none"}),
        ("sd2", {"method": "iet_agc", "num_shards": 2, "train_mode": "lora"}),
        ("sd1", {"num_shards": 2, "taa_sharpness": 0.5, "proportion_empty_prompts": 0.3}),
        ("sd1", {"num_shards": 2, "taa_sharpness": 0.5, "taa_variants": 2}),
        ("sdxl", {"num_shards": 2, "caption_prefix": "a", "aspect_ratio_buckets": "24,40;32,32"}),
        ("sdxl", {"taa_sharpness": 0.5, "taa_variants": 1, "taa_operations": "randaugment"}),
    ],
    ids=[
        *("plain", "AGC, LoRA", "whole method, dropped captions", "variants of augmented images"),
        *("SDXL, buckets, prefix", "SDXL, variants"),
    ],
)
def test_training_is_the_same_to_rounding(settings, kind, given):
    given = FITTING | {"random_flip": True, "steps_per_round": 3, "bank_bins": 1} | given
    config = settings(kind=kind, cache="on", **given)
    cached, rounds, dataset = train(config)
    plain, others, pixels = train(settings(kind=kind, cache="off", **given))
    assert isinstance(dataset.latents, Latents)
    assert isinstance(dataset.read, Texts)
    assert pixels.latents is pixels.augmented is None
    assert isinstance(dataset.augmented, Latents) == ("taa_variants" in given)
    # Of the VAE's work the loop has none but for augmented images, unless these are kept too.
    counts = [event.counts for done in rounds for event in done.shards]
    augmented, encoded = (sum(getattr(c, n) for c in counts) for n in ("augmented", "encoded"))
    assert (augmented > 0) == config.method.taa
    assert encoded == (0 if "taa_variants" in given else augmented)
    assert decisions(rounds) == decisions(others)
    for name, weight in plain.items():
        assert torch.allclose(cached[name], weight, atol=1e-4), name
    assert any(not torch.equal(cached[name], weight) for name, weight in plain.items())


def test_a_visit_reads_one_of_several_captions_with_a_cache_too(settings, images, tmp_path):
    """The same one as without, and embedded as the encoder does."""
    folder = tmp_path / "several"
    shutil.copytree(images, folder)
    rows = [{"file_name": f"{n:02d}.png", "text": [f"a cat {n}", f"a dog {n}"]} for n in range(16)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = FITTING | {"train_data_dir": str(folder), "method": "none", "random_flip": True}
    (components, _, dataset), (_, _, plain) = (
        prepare(settings(cache=cache, **given)) for cache in ("on", "off")
    )
    assert len(dataset.read.captions) == 32
    objective = Objective(components, torch.device("cpu"), nullcontext)
    met = set()
    for seed in range(40):
        told, asked = (collate([each[Visit(seed % 2, seed)]]) for each in (dataset, plain))
        condition, expected = map(objective.encode_captions, (told, asked))
        assert torch.allclose(
            condition["encoder_hidden_states"], expected["encoder_hidden_states"], atol=1e-5
        )
        met.add(tuple(asked["input_ids"].flatten().tolist()))
    assert len(met) == 4


def test_each_visit_draws_a_fresh_latent_of_the_posterior(settings):
    """As many flips, and latents of the same distribution, as the VAE gives in every visit."""
    config = settings(cache="on", random_flip=True, **FITTING)
    components, _, dataset = prepare(config)
    plain = TrainingImages(dataset.source, components.tokenize, config.data)
    objective = Objective(components, torch.device("cpu"), nullcontext)
    visits = [Visit(3, seed) for seed in range(400)]

    def latents(images, visits):
        examples = [images[visit] for visit in visits]
        seeds = torch.tensor([visit.seed for visit in visits])
        names = [n for n in examples[0] if n in ("pixel_values", "latent_mean", "latent_std")]
        batch = {n: torch.stack([torch.as_tensor(e[n]) for e in examples]) for n in names}
        return objective.encode_images(batch | {"seed": seeds}, "score/posterior")

    drawn = latents(dataset, visits)
    assert torch.allclose(drawn, latents(plain, visits), atol=1e-5)
    assert len(drawn.unique(dim=0)) == 400
    others = latents(plain, [Visit(3, seed) for seed in range(400, 800)])
    for place in ((0, 0, 0), (1, 2, 3), (3, 3, 1)):
        two = (found[:, *place].numpy() for found in (drawn, others))
        assert stats.ks_2samp(*two).pvalue > 1e-3
    rows = [dataset.latents.variants.row_of(visit) for visit in visits]
    assert stats.binomtest(sum(row % 2 for row in rows), 400).pvalue > 1e-3


def test_some_crops_stand_for_all(settings):
    """Every crop lies where `place` puts it, any is drawn as often, and a seed keeps its flip."""
    config = settings(cache="on", cache_crops=3, random_flip=True)
    _, _, dataset = prepare(config)
    variants = dataset.latents.variants
    assert (variants.crops, variants.flips, len(variants)) == (3, 2, 16 * 6)
    corners = {
        tuple(variants[row]["crop_top_left"]) for row in range(len(variants)) if row % 2 == 0
    }
    assert len(corners) > 3
    rows = [variants.row_of(Visit(5, seed)) for seed in range(600)]
    counts = np.bincount(np.array(rows) - min(rows), minlength=6)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3
    for seed, row in enumerate(rows[:20]):
        drawn = torch.rand(3, dtype=torch.float64, generator=Visit(5, seed).generator("view"))
        assert row % 2 == (drawn[2] < 0.5)
        assert (row - min(rows)) // 2 == int(drawn[0] * 3)
        assert variants.variant(row).index == 5


def test_images_are_augmented_where_the_model_is(settings):
    config = settings(cache="off", method="iet_agc_plus", **FITTING)
    components = load_components(config.model, torch.float32, None)
    components.device = torch.device("meta")
    source = load_source(config.data)
    images = cached_images(config, source, components, choose(config, source, 10**6))
    (example,) = images.examples([(Visit(0, 1), Augmentation(5.0, operations="gentle"))])
    assert example["pixel_values"].device.type == "meta"


def test_variants_know_their_images(settings):
    """The rows of two sizes lie apart, and each is the view of the image that it says."""
    config = settings(cache="on", aspect_ratio_buckets="24,40;32,32", cache_crops=2)
    source = load_source(config.data)
    source = replace(source, sizes=tuple((24, 40) if i % 3 else (32, 32) for i in range(16)))
    variants = Variants(source, config.data, config.training.cache_crops)
    assert sum(variants.groups) == len(variants) == 32
    sizes = [variants.size_of(row) for row in range(32)]
    assert sizes == sorted(sizes)
    for row in range(32):
        assert tuple(variants[row]["pixel_values"].shape[1:]) == variants.size_of(row)
        assert source.sizes[variants.variant(row).index] == variants.size_of(row)
