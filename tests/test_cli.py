"""The command line from end to end: what a run leaves behind, and one clear error for a mistake."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from iet_sd.cli.train import train
from tests.compare import equal
from tests.launching import Launched


def unet(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def launched(argv, processes):
    """Run by ``accelerate launch`` in several processes; returns exit status and output."""
    run = Launched(argv, processes if processes > 1 else 0)
    return run.wait(), run.output()


def test_a_run_leaves_a_pipeline_and_its_records(argv, tmp_path, capsys):
    flags = argv(report_to="tensorboard", validation_rounds=1, num_validation_images=2)
    prompts = ["--validation_prompts", "a cat", "a dog", "--validation_inference_steps", "2"]
    assert train([*flags, *prompts]) == 0
    output = tmp_path / "output"
    assert {p.name for p in output.iterdir()} == {
        "README.md",
        "checkpoint-1",
        "checkpoint-2",
        "logs",
        "metrics.jsonl",
        "model_index.json",
        "sample_grid.png",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "training_config.yaml",
        "unet",
        "vae",
        "validation-1.png",
        "validation-2.png",
    }
    assert Image.open(output / "sample_grid.png").width == 2 * 128
    assert list((output / "logs").rglob("events.out.tfevents*"))
    lines = metrics(output)
    assert [(line["kind"], line["round"], line.get("shard")) for line in lines] == [
        ("shard", 1, 0),
        ("shard", 1, 1),
        ("round", 1, None),
        ("shard", 2, 0),
        ("shard", 2, 1),
        ("round", 2, None),
    ]
    assert "Saved to" in capsys.readouterr().out


@pytest.mark.slow
def test_precision_of_16_bits_trains_on_the_cpu(argv, tmp_path):
    assert train(argv(mixed_precision="bf16", train_mode="lora")) == 0
    (weights,) = (tmp_path / "output").glob("*.safetensors")
    assert {str(t.dtype) for t in load_file(weights).values()} == {"torch.float32"}


def test_resumed_equals_never_stopped(argv, tmp_path):
    """From the first checkpoint, with the later ones and the result gone."""
    whole, broken = tmp_path / "output", tmp_path / "broken"
    assert train(argv()) == 0
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-1", broken / "checkpoint-1")
    shutil.copyfile(whole / "metrics.jsonl", broken / "metrics.jsonl")
    assert train(argv(output_dir=broken, resume_from_checkpoint="latest")) == 0
    assert equal(unet(whole), unet(broken))
    assert len(metrics(broken)) == len(metrics(whole))


def test_a_seed_that_was_drawn_goes_on(argv, tmp_path):
    assert train(argv(seed=None)) == 0
    whole = unet(tmp_path / "output")
    shutil.rmtree(tmp_path / "output" / "checkpoint-2")
    assert train(argv(seed=None, resume_from_checkpoint="latest")) == 0
    assert equal(unet(tmp_path / "output"), whole)


@pytest.mark.parametrize(
    "given",
    [
        {"num_shards": 2, "proxy_optimizer": "average", "outer_momentum": 0.5},
        pytest.param(
            {"num_shards": 3, "train_mode": "lora", "lora_aggregation": "product"},
            marks=pytest.mark.slow,
        ),
        # 17 crops of 16 images: a file for each process.
        {
            "num_shards": 3,
            "train_mode": "lora",
            "proxy_store": "disk",
            "cache": "on",
            "cache_crops": 17,
        },
    ],
    ids=["two shards", "three shards, LoRA", "three shards, LoRA, on disk, cached"],
)
def test_two_processes_equal_one(given, argv, tmp_path):
    """Shard k on process k mod 2: the same samples skipped and moved, weights equal to rounding."""
    given |= {"num_rounds": 3, "steps_per_round": 6, "agc_threshold": 1.0, "bank_bins": 1}
    status, output = launched(argv(**given), processes=2)
    assert status == 0, output
    assert "2 x cpu" in output
    alone = {"output_dir": tmp_path / "one", "cache_dir": tmp_path / "other"}
    status, output = launched(argv(**given | alone), processes=1)
    assert status == 0, output
    lines = [metrics(tmp_path / folder) for folder in ("output", "one")]
    assert sum(map(sum, (line["moved"] for line in lines[0] if line["kind"] == "round"))) > 0
    name = "pytorch_lora_weights.safetensors"
    read = (lambda folder: load_file(folder / name)) if "train_mode" in given else unet
    two, one = read(tmp_path / "output"), read(tmp_path / "one")
    assert all(torch.allclose(two[k], one[k], atol=1e-4) for k in one)
    keys = ("round", "shard", "scored", "skipped", "moved", "updates", "size")
    assert [[x.get(k) for k in keys] for x in lines[0]] == [
        [x.get(k) for k in keys] for x in lines[1]
    ]
    if "cache" in given:
        made = [sorted((tmp_path / d / "iet_sd").glob("*/*")) for d in ("cache", "other")]
        assert len(made[0]) == 5
        assert [f.parts[-2:] for f in made[0]] == [f.parts[-2:] for f in made[1]]


@pytest.mark.slow
def test_more_processes_than_shards(argv):
    status, output = launched(argv(num_shards=2), processes=3)
    assert status != 0
    assert "error: 3 processes for 2 shards" in output


def test_dry_run_says_what_would_happen_and_writes_nothing(argv, tmp_path, capsys):
    assert train(argv(dry_run="")) == 0
    said = capsys.readouterr().out
    assert "samples:   16 in 2 shards of 8, 8" in said
    assert "2 rounds of 2 updates per shard: 4 for each proxy, 8 together" in said
    assert "bank_bins: 50" in said
    assert "memory:" in said
    assert "Python and its libraries take about 1.3 GiB of it more" in said
    assert "time:" in said
    assert re.search(r"cache:     0\.00 GiB under \S+iet_sd\n", said)
    assert " 16 captions are encoded once; images are encoded in every visit: a random" in said
    assert not (tmp_path / "output").exists()


def test_what_a_gpu_will_do_is_planned_without_one(argv, capsys):
    """Its precision: half the bytes of what is frozen and of activations."""
    given = argv(train_mode="lora", train_batch_size=4096)
    assert train([*given, "--mixed_precision", "fp16"]) == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err
    found = {}
    for precision in ("fp16", "no"):
        assert train([*given, "--dry_run", "--mixed_precision", precision]) == 0
        said = capsys.readouterr().out
        assert f"mixed_precision: {precision}" in said
        found[precision] = float(re.search(r"activations at most ([\d.]+) GiB", said)[1])
    assert found["no"] > 0.2
    assert found["fp16"] == pytest.approx(found["no"] / 2, abs=0.01)


def test_an_earlier_result_is_not_written_over(argv, tmp_path, capsys):
    assert train(argv(num_rounds=2)) == 0
    assert train(argv(num_rounds=1)) == 2
    assert "holds a model or an earlier run" in capsys.readouterr().err
    assert train(argv(num_rounds=1, overwrite_output_dir="")) == 0
    assert [p.name for p in (tmp_path / "output").glob("checkpoint-*")] == ["checkpoint-1"]


def test_what_a_killed_run_was_writing_goes_away(argv, tmp_path):
    half = tmp_path / "output" / ".metrics.jsonl.0a1b2c3d.partial"
    half.parent.mkdir()
    half.write_text("half")
    assert train(argv()) == 0
    assert not half.exists()


MISTAKES = {
    "no such model": ({"pretrained_model_name_or_path": "./nowhere"}, "no folder ./nowhere"),
    "no such data": ({"train_data_dir": "nowhere"}, "nowhere"),
    "wrong caption column": ({"caption_column": "prompt"}, "--caption_column text"),
    "more shards than images": ({"num_shards": 17}, "lower --num_shards"),
    "contradiction": ({"method": "none", "num_shards": 4}, "--method none is plain"),
    "nothing to resume": ({"resume_from_checkpoint": "checkpoint-7"}, "not a checkpoint folder"),
    "no such held-out folder": ({"heldout_data_dir": "nowhere"}, "--heldout_data_dir nowhere"),
    "no such held-out split": ({"heldout_split": "tset"}, "--heldout_split tset: "),
    "a LoRA's flag": ({"rank": 8}, "--rank needs --train_mode lora"),
    "odd resolution": ({"resolution": 36}, "multiple of 8"),
    "missing tracker": ({"report_to": "wandb"}, "pip install wandb"),
    "no xformers": ({"enable_xformers_memory_efficient_attention": ""}, "requirements-xformers"),
}


@pytest.mark.parametrize(("given", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_error(given, message, argv, capsys):
    assert train(argv(**given)) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: ")
    assert message in said.err
    assert "Traceback" not in said.err + said.out


@pytest.mark.parametrize(
    ("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Mega")]
)
def test_what_accelerate_is_configured_for_is_refused_if_it_is_not_done(
    variable, name, argv, monkeypatch, capsys
):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    assert train(argv()) == 2
    assert f"accelerate's configuration asks for {name}" in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_fp16_needs_a_gpu(argv, capsys):
    assert train(argv(mixed_precision="fp16")) == 2
    assert "needs a GPU" in capsys.readouterr().err


def odd_folder(root):
    """Pictures of all kinds, a file that is none, and one without a caption."""
    root.mkdir()
    noise = Image.effect_noise((40, 40), 80)
    noise.convert("P").save(root / "palette.png")
    noise.convert("CMYK").save(root / "cmyk.jpg")
    noise.convert("RGBA").save(root / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.convert("RGB").save(root / "turned.jpg", exif=exif)
    whole = root / "turned.jpg"
    (root / "cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (root / "text.png").write_text("not a picture")
    noise.save(root / "mute.png")
    for picture in list(root.iterdir()):
        if picture.name != "mute.png":
            picture.with_suffix(".txt").write_text(f"a cat, {picture.stem}")
    return root


def test_a_folder_of_odd_files(argv, tmp_path, capsys):
    folder = odd_folder(tmp_path / "odd")
    assert train(argv(train_data_dir=folder)) == 2
    assert "mute.png" in capsys.readouterr().err
    assert train(argv(train_data_dir=folder, on_missing_caption="skip")) == 2
    said = capsys.readouterr().err
    assert "cut.jpg" in said
    assert "text.png" in said
    assert "Traceback" not in said
    skipping = {"on_missing_caption": "skip", "on_bad_image": "skip"}
    assert train(argv(train_data_dir=folder, **skipping)) == 0
    assert sum(line["size"] for line in metrics(tmp_path / "output")[:2]) == 4

    one = tmp_path / "one"
    one.mkdir()
    shutil.copyfile(folder / "alpha.png", one / "alpha.png")
    (one / "alpha.txt").write_text("a cat")
    elsewhere = {"output_dir": tmp_path / "elsewhere"}
    assert train(argv(train_data_dir=one, num_shards=4, **elsewhere)) == 2
    assert "1 sample cannot fill 4 shards" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert train(argv(train_data_dir=empty, **elsewhere)) == 2
    assert "no images" in capsys.readouterr().err.lower()
