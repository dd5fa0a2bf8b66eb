"""Encoded once: the same training as encoded in every visit, and who finds what again."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import TrainingImages, collate
from iet_sd.data.latents import Latents, Texts, Variants
from iet_sd.data.shards import Visit, split
from iet_sd.data.sources import load_source
from iet_sd.engine import caching
from iet_sd.engine.caching import cached_images, choose
from iet_sd.engine.objective import Objective
from iet_sd.engine.plan import weight_dtype
from iet_sd.engine.rounds import Trainer
from iet_sd.engine.state import RoundDone
from iet_sd.errors import UserError
from iet_sd.models.adapter import lora_pairs, make_trainable
from iet_sd.models.loading import load_components
from tests.pipelines import RESOLUTION, tiny_pipeline

FITTING = {"resolution": RESOLUTION, "center_crop": True}


def prepare(config, visits=10**6):
    components = load_components(config.model, torch.float32, None)
    parameters = make_trainable(components, config.model, seed=0)
    source = load_source(config.data)
    beforehand = choose(config, source, visits)
    return components, parameters, cached_images(config, source, components, beforehand)


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


def forbidden():
    raise AssertionError("a network is loaded that nothing needs")


@pytest.mark.parametrize(
    ("method", "taa_variants", "vae"),
    [("iet_agc", 0, False), ("iet_agc_plus", 0, True), ("iet_agc_plus", 2, False)],
)
def test_what_is_cached_is_neither_loaded_nor_kept(settings, method, taa_variants, vae):
    """TAA alone encodes images in training. The second run finds all that the first has made."""
    config = settings(cache="on", method=method, taa_variants=taa_variants, **FITTING)
    first, _, made = prepare(config)
    assert set(first._loaded) == ({"vae"} if vae else set())
    components = load_components(config.model, torch.float32, None)
    components.loaders = {
        name: load if name == "vae" and vae else forbidden
        for name, load in components.loaders.items()
    }
    source = load_source(config.data)
    beforehand = choose(config, source, 10**6)
    found = cached_images(config, source, components, beforehand)[Visit(0, 1)]
    assert torch.equal(found["latent_mean"], made[Visit(0, 1)]["latent_mean"])
    assert not {"pixel_values", "input_ids"} & set(found)


def test_a_bar_counts_what_is_made_and_none_what_is_found(settings, capsys):
    config = settings(cache="on", **FITTING)
    prepare(config)
    bars = capsys.readouterr().err
    assert all(f"Encoding {kind}: 100%" in bars for kind in ("texts", "latents"))
    assert bars.count("| 16/16 ") >= 2
    prepare(config)
    assert "Encoding" not in capsys.readouterr().err


def test_images_are_augmented_where_the_model_is(settings):
    config = settings(cache="off", method="iet_agc_plus", **FITTING)
    components = load_components(config.model, torch.float32, None)
    components.device = torch.device("meta")
    source = load_source(config.data)
    images = cached_images(config, source, components, choose(config, source, 10**6))
    (example,) = images.examples([(Visit(0, 1), Augmentation(5.0, operations="gentle"))])
    assert example["pixel_values"].device.type == "meta"


def tables(tmp_path):
    return sorted((tmp_path / "cache" / "iet_sd").iterdir())


def test_a_build_that_was_stopped_goes_on(settings, tmp_path, monkeypatch):
    """Of six files two are made before the end; the others are made later, to the same bits."""
    monkeypatch.setattr("iet_sd.data.cache.ROWS", 6)
    config = settings(cache="on", random_flip=True, **FITTING)
    encode, made = caching._encode_images, []

    def stops(components, variants, workers, rows):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(rows)
        yield from encode(components, variants, workers, rows)

    monkeypatch.setattr(caching, "_encode_images", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    (folder,) = (f for f in tables(tmp_path) if f.name.startswith("latents"))
    assert len(list(folder.glob("*.safetensors"))) == 2
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(caching, "_encode_images", encode)
    _, _, dataset = prepare(config)
    assert all(path.stat().st_mtime_ns == when for path, when in times.items())
    assert not dataset.latents.table.missing()
    half = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    prepare(config)
    assert half == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"center_crop": False}, ["random crop", "--cache_crops"]),
        ({"check_images": "none"}, ["--check_images none"]),
        ({"shuffle_caption": True}, ["captions", "--shuffle_caption"]),
        ({"train_text_encoder": True}, ["captions", "--train_text_encoder"]),
    ],
)
def test_what_cannot_be_cached_is_refused_or_left(settings, given, words):
    given = FITTING | given
    with pytest.raises(UserError) as error:
        prepare(settings(cache="on", **given))
    assert all(word in str(error.value) for word in [*words, "--cache auto"])
    _, _, dataset = prepare(settings(cache="auto", **given))
    about_images = "captions" not in words
    assert (dataset.latents is None) == about_images
    assert isinstance(dataset.read, Texts) == about_images
    told = choose(settings(cache="auto", **given), dataset.source, 10**6).describe()
    assert all(word in told for word in words)
    assert "16 " in told


def test_auto_encodes_beforehand_only_what_is_visited_more_often(settings):
    config = settings(cache="auto", random_flip=True, **FITTING)
    for visits, (texts, latents) in {
        15: (False, False),
        16: (True, False),
        31: (True, False),
        32: (True, True),
    }.items():
        _, _, dataset = prepare(config, visits)
        assert isinstance(dataset.read, Texts) == texts
        assert (dataset.latents is not None) == latents


def test_other_content_transforms_or_weights_are_another_table(
    settings, tmp_path, images, pipelines
):
    """And the same data in another place, with other names and order, is the same one."""
    base = {"cache": "on", **FITTING}
    prepare(settings(**base))
    before = set(tables(tmp_path))
    moved = tmp_path / "moved"
    moved.mkdir()
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(reversed(lines)):
        shutil.copy(images / line["file_name"], moved / f"x{number:02d}.png")
        line["file_name"] = f"x{number:02d}.png"
    (moved / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare(settings(**base, train_data_dir=str(moved)))
    assert set(tables(tmp_path)) == before
    prepare(settings(**base, learning_rate=1e-5, num_shards=1, method="none", seed=7))
    assert set(tables(tmp_path)) == before

    Image.new("RGB", (40, 36), "red").save(moved / "x00.png")
    other_vae = tiny_pipeline(tmp_path / "other")
    weights = other_vae / "vae" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    for given, kinds in (
        ({"train_data_dir": str(moved)}, ["latents"]),
        ({"image_interpolation_mode": "bilinear"}, ["latents"]),
        ({"random_flip": True}, ["latents"]),
        ({"resolution": 24}, ["latents"]),
        ({"pretrained_model_name_or_path": str(other_vae)}, ["latents"]),
        ({"caption_prefix": "a"}, ["texts"]),
        ({"kind": "sd2"}, ["texts"]),
        ({"mixed_precision": "bf16"}, ["latents", "texts"]),
    ):
        before = set(tables(tmp_path))
        prepare(settings(**base | given))
        new = sorted(path.name.split("-")[0] for path in set(tables(tmp_path)) - before)
        assert new == kinds, given


def test_damage_is_named_and_told_how_to_mend(settings, tmp_path):
    config = settings(cache="on", **FITTING)
    prepare(config)
    latents, texts = tables(tmp_path)
    file = latents / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    _, _, dataset = prepare(config)
    with pytest.raises(UserError, match=r"(?s)cannot be used.*Delete it.*--cache off") as error:
        dataset[Visit(0, 0)]
    assert str(file) in str(error.value)
    (texts / "index.json").write_text("{}")
    with pytest.raises(UserError, match="Delete"):
        prepare(config)


def test_a_place_that_cannot_be_written_to(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache_dir .* cannot be written to"):
        prepare(settings(cache="on", cache_dir=str(tmp_path / "file"), **FITTING))


def test_off_makes_nothing(settings, tmp_path):
    _, _, dataset = prepare(settings(cache="off", **FITTING))
    assert dataset.latents is None
    assert not (tmp_path / "cache" / "iet_sd").exists()
    assert replace(dataset.source, digests=()).spare is True


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("sd1", {"random_flip": True, "mixed_precision": "fp16"}),
        ("sdxl", {"cache_crops": 2, "center_crop": False, "mixed_precision": "fp16"}),
        ("sdxl", {"aspect_ratio_buckets": "24,40;32,32", "mixed_precision": "no"}),
        ("sd1", {"taa_variants": 1, "random_flip": True, "mixed_precision": "no"}),
    ],
    ids=["flips, 16 bits", "SDXL, crops, VAE in 32 bits", "SDXL, sizes", "augmented"],
)
def test_the_size_is_that_of_the_files(settings, tmp_path, kind, given):
    """Known from the configs of the model, before there is any."""
    config = settings(kind=kind, cache="on", **FITTING | given)
    source = load_source(config.data)
    beforehand = choose(config, source, 10**6)
    told = beforehand.size(config)
    dtype = weight_dtype(config.training.mixed_precision)
    cached_images(config, source, load_components(config.model, dtype, None), beforehand)
    files = list((tmp_path / "cache" / "iet_sd").glob("*/*.safetensors"))
    written = sum(t.nbytes for file in files for t in load_file(file).values())
    assert told == written > 10_000
    none = choose(settings(kind=kind, cache="off", **FITTING | given), source, 10**6)
    assert none.size(config) == 0


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
