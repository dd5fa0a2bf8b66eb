"""The README's commands as written; the demo is shortened by flags only."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from iet_sd.seeding import seed_for

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
SET_UP = "python3.11 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
SHORT = "--num_rounds 2 --max_train_steps 16 --max_train_samples 64 --num_validation_images 1"
EVALUATED = [
    *("--num_prompts", "32", "--num_inference_steps", "3", "--max_train_samples", "64"),
    *("--membership_samples", "16", "--membership_timesteps", "2", "--bootstrap_resamples", "100"),
]
# What someone runs who has diffusers and the result, and nothing of ours.
STRANGER = """
import importlib.util, json, sys
import torch
from diffusers import StableDiffusionPipeline

assert importlib.util.find_spec("iet_sd") is None
folder, lora, picture, prompt, seed, steps = json.loads(sys.argv[1])
pipeline = StableDiffusionPipeline.from_pretrained(folder)
if lora:
    pipeline.load_lora_weights(lora)
generator = torch.Generator().manual_seed(seed)
call = dict(height=64, width=64, num_inference_steps=steps, guidance_scale=4.0)
pipeline([prompt], generator=[generator], **call).images[0].save(picture)
"""


def commands():
    return [block.strip() for block in BLOCKS if block.startswith(SET_UP)]


def test_two_commands_and_ci_runs_the_second():
    main, tests = commands()
    assert main == SET_UP + (
        "accelerate launch train_iet_sd.py --config configs/demo.yaml && "
        "python -m iet_sd evaluate --config configs/demo_evaluation.yaml"
    )
    assert tests == SET_UP + "pytest"
    assert "grep -m 1 '&& pytest$' README.md" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(
    "lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_the_demo_runs_and_its_result_draws_the_same_where_iet_sd_is_not(lora, tmp_path):
    command, evaluation = commands()[0].removeprefix(SET_UP).split(" && ")
    if lora:
        command = command.replace("demo.yaml", "demo_lora.yaml")
    output = tmp_path / "demo"
    command = f"{command} {SHORT} --output_dir {output}"
    bin = Path(sys.executable).parent
    done = subprocess.run(
        [bin / "accelerate", *shlex.split(command)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round   loss  skipped" in done.stdout
    rounds = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["updates"] for line in rounds if line["kind"] == "round") == 16

    if not lora:
        evaluate = [sys.executable, *shlex.split(evaluation)[1:], *EVALUATED]
        model = ["--pretrained_model_name_or_path", str(output)]
        subprocess.run([*evaluate, *model], cwd=ROOT, check=True, timeout=300)
        report = json.loads((output / "evaluation" / "report.json").read_text())
        assert report["data"]["heldout"]["count"] == 482
        assert (output / "evaluation" / "report.html").is_file()

    folder = str(ROOT / "demo/model") if lora else str(output)
    picture = tmp_path / "picture.png"
    prompt, seed = "fearful face, face concerned", seed_for(0, "sample", 0, 0)
    job = json.dumps([folder, str(output) if lora else None, str(picture), prompt, seed, 25])
    subprocess.run([sys.executable, "-c", STRANGER, job], cwd=tmp_path, check=True, timeout=300)
    drawn = Image.open(picture).resize((128, 128), Image.Resampling.NEAREST)
    shown = Image.open(output / "sample_grid.png").crop((0, 0, 128, 128))
    # The trained model drew the first, the loaded one the second; a rounding apart at most.
    difference = ImageChops.difference(drawn, shown)
    assert max(high for _, high in difference.getextrema()) <= 2
