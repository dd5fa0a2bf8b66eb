"""Tables of what is encoded: who finds them again, their size, and what is wrong with some."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from iet_sd.data.shards import Visit
from iet_sd.data.sources import load_source
from iet_sd.engine import caching
from iet_sd.engine.beforehand import choose
from iet_sd.engine.caching import cached_images
from iet_sd.engine.plan import weight_dtype
from iet_sd.errors import UserError
from iet_sd.models.loading import load_components
from tests.engine.preparing import FITTING, prepare, tables
from tests.pipelines import tiny_pipeline


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
    told = sum(beforehand.sizes(config).values())
    dtype = weight_dtype(config.training.mixed_precision)
    cached_images(config, source, load_components(config.model, dtype, None), beforehand)
    files = list((tmp_path / "cache" / "iet_sd").glob("*/*.safetensors"))
    written = sum(t.nbytes for file in files for t in load_file(file).values())
    assert told == written > 10_000
    none = choose(settings(kind=kind, cache="off", **FITTING | given), source, 10**6)
    assert none.sizes(config) == {}
