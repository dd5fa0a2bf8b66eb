"""A Hub on this machine, something to push, and flags of an evaluation."""

import json

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from tests.cli.pushing import UNET
from tests.hub_server import Hub
from tests.pipelines import RESOLUTION


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process and those it starts take for the only one; nobody is logged in."""
    with Hub() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        # These are read when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        # Between its attempts.
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
        yield server


@pytest.fixture
def result(tmp_path):
    """A folder with what a run and an evaluation leave there, and more: by name, as text."""
    folder = tmp_path / "result"
    data = str(tmp_path / "pictures")
    report = {
        "created": "2026-01-01T00:00:00+00:00",
        "settings": {
            "train_data_dir": data,
            "pretrained_model_name_or_path": str(folder),
            "embedders": ["pixels", f"sscd_disc_mixup={tmp_path}/weights.pt"],
        },
        "model": {"name": str(folder)},
        "command": f"python -m iet_sd evaluate --train_data_dir {data}",
    }
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    index |= {"_name_or_path": str(tmp_path / "base")}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "x"]}
    files = {
        "model_index.json": json.dumps(index),
        UNET: "weights",
        "unet/config.json": json.dumps({"_name_or_path": str(tmp_path / "base"), "x": 1}),
        "tokenizer/merges.txt": "",
        "README.md": "# result\n",
        "training_config.yaml": yaml.safe_dump({"train_data_dir": data, "seed": 0}),
        "metrics.jsonl": "{}\n",
        "sample_grid.png": "picture",
        "validation-2.png": "picture",
        "evaluation/report.json": json.dumps(report),
        "evaluation/report_public.html": f"<td>{data}</td>",
    }
    others = [
        "checkpoint-2/proxy-0.safetensors",
        "logs/iet-sd-fine-tune/events.out.tfevents.1",
        "evaluation/cache/generations/0.png",
        "evaluation/pairs.parquet",
        "evaluation/report.html",
        "probe/round-1/weights.safetensors",
        "best/unet/diffusion_pytorch_model.safetensors",
        "proxies/proxy-0.safetensors",
        "unet_non_ema/diffusion_pytorch_model.safetensors",
        "unet/checkpoint-1/optimizer.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/.config.json.partial",
        "unet/.hidden.json",
        ".partial/unet/config.json",
        ".hub/README.md",
        ".env",
        "optimizer.safetensors",
        "notes.txt",
        "vae/config.json",
    ]
    for name, text in (files | dict.fromkeys(others, "not for others")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder, set(files)


@pytest.fixture
def flags(pipelines, images, heldout, tmp_path):
    """Flags of a small evaluation; a keyword replaces one, or with None takes it away."""
    from accelerate.state import AcceleratorState

    def make(command="evaluate", **given):
        values = {
            "pretrained_model_name_or_path": pipelines["sd1"],
            "train_data_dir": images,
            "heldout_data_dir": heldout,
            "output_dir": tmp_path / "evaluation",
            "resolution": RESOLUTION,
            "num_inference_steps": 2,
            "images_per_prompt": 2,
        }
        if command == "evaluate":
            values |= {
                "embedders": "pixels",
                "quality_embedder": "python=tests.few_features:quadrants",
                "membership_samples": 8,
                "membership_timesteps": 2,
                "bootstrap_resamples": 100,
            }
        pairs = [(f"--{k}", v) for k, v in (values | given).items() if v is not None]
        return [command, *(str(part) for pair in pairs for part in pair)]

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
