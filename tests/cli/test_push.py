"""The Hub, by its real client and a server on this machine: what arrives, and what never does."""

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from safetensors.torch import load, load_file

from iet_sd import arguments
from iet_sd.arguments import from_layers
from iet_sd.cli import train as training
from iet_sd.cli.main import main
from iet_sd.cli.train import train
from iet_sd.engine.identity import identity
from iet_sd.hub import contents as hub_contents
from iet_sd.hub.background import BackgroundPush
from iet_sd.hub.card import write_card
from iet_sd.hub.push import Repository
from iet_sd.models import saving
from tests.compare import equal
from tests.hub_server import TOKEN, Hub

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA, KOHYA = saving.LORA, saving.KOHYA_LORA
COMMIT, UPLOAD = "POST /api/models/.*/commit/", "PUT /lfs/"


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
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "x"]}
    files = {
        "model_index.json": json.dumps(index),
        UNET: "weights",
        "unet/config.json": "{}",
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


def flags(folder, **given):
    """Of the command push."""
    given = {"hub_token": TOKEN, "hub_model_id": "me/cats"} | given
    return ["push", str(folder), *(f"--{k}={v}" for k, v in given.items() if v is not None)]


def nowhere(token, folder, said):
    """The token is in no file of ``folder``, and in nothing that was said."""
    texts = [path for path in folder.rglob("*") if path.is_file()]
    assert texts
    assert [path for path in texts if token.encode() in path.read_bytes()] == []
    assert token not in said.out + said.err


def test_what_is_named_arrives_and_nothing_else(hub, result, tmp_path, capsys):
    """B.3 item 7: diffusers' scripts push checkpoints with their optimizer states, and logs."""
    folder, names = result
    assert main(flags(folder)) == 0
    arrived = hub.files("me/cats")
    assert set(arrived) == {*names, ".gitattributes"}
    assert not hub.private["me/cats"]
    assert str(tmp_path).encode() not in b"".join(arrived.values())
    assert yaml.safe_load(arrived["training_config.yaml"]) == {
        "train_data_dir": "pictures",
        "seed": 0,
    }
    said = capsys.readouterr()
    assert f"Pushed {len(names)} files to {hub.url}/me/cats\n" in said.out
    nowhere(TOKEN, tmp_path, said)


def test_the_names_are_those_that_training_saves_by():
    assert hub_contents.LORAS == (LORA, KOHYA)
    assert hub_contents.INDEX == saving.INDEX


def test_the_name_of_the_folder_and_the_token_of_a_login(hub, result, monkeypatch, tmp_path):
    folder, _ = result
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN + "\n")
    assert main(flags(folder, hub_token=None, hub_model_id=None)) == 0
    (tmp_path / "hf" / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(flags(folder, hub_token=None, hub_model_id="other")) == 0
    assert set(hub.commits) == {"me/result", "me/other"}


FAULTS = {
    "nobody there": ("me/cats", None, "it cannot be reached (ConnectError"),
    "token": ("me/cats", {"GET /api/whoami": 401}, "the Hub does not accept the token"),
    "no right": ("them/cats", {}, "the token may not write there"),
    "error at once": ("me/cats", {"GET /api/whoami": 503}, "the Hub answered with status 503"),
    "error": ("me/cats", {COMMIT: 500}, "the Hub answered with status 500 (as the test says)"),
    "in the middle": ("me/cats", {UPLOAD: "drop"}, "it cannot be reached (RemoteProtocolError"),
    "at the end": ("me/cats", {COMMIT: "drop"}, "it cannot be reached (RemoteProtocolError"),
}


@pytest.mark.parametrize(("name", "faults", "said"), FAULTS.values(), ids=FAULTS)
def test_what_fails_is_one_line_and_works_later(
    name, faults, said, hub, result, monkeypatch, capsys, tmp_path
):
    folder, names = result
    if faults is None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.faults = faults or {}
    assert main(flags(folder, hub_model_id=name)) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith(f"error: {name} on the Hub: {said}")
    assert "Traceback" not in told.err
    assert all(set(versions[-1]) == {".gitattributes"} for versions in hub.commits.values())
    hub.faults = {}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert main(flags(folder)) == 0
    assert set(hub.files("me/cats")) == {*names, ".gitattributes"}
    nowhere(TOKEN, tmp_path, told)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hub_token": None}, "there is no token; log in by `hf auth login`, or set HF_TOKEN."),
        ({"hub_token": "hf_two\nlines"}, "The token for the Hub has characters that none has"),
        ({"hub_model_id": "my cats"}, "'my cats' is no name for a repository on the Hub"),
        ({"hub_model_id": "a/b/c"}, "'a/b/c' is no name for a repository on the Hub"),
    ],
    ids=str,
)
def test_what_is_not_asked_for_rightly(given, said, hub, result, capsys):
    assert main(flags(result[0], **given)) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "two" not in line
    assert not hub.commits


def test_what_is_no_result_is_not_pushed(hub, result, tmp_path, capsys):
    folder, _ = result
    assert main(flags(tmp_path / "absent")) == 2
    assert "is no result: expected model_index.json" in capsys.readouterr().err
    shutil.rmtree(folder / "unet")
    assert main(flags(folder)) == 2
    assert "is no whole pipeline: model_index.json names unet/" in capsys.readouterr().err
    (folder / "model_index.json").unlink()
    assert main(flags(folder)) == 2
    assert "is no result" in capsys.readouterr().err
    assert not hub.requests


def test_private_means_private(hub, result, capsys):
    folder, _ = result
    assert main([*flags(folder), "--hub_private"]) == 0
    assert hub.private == {"me/cats": True}
    hub.private["me/cats"] = False
    versions = len(hub.commits["me/cats"])
    assert main([*flags(folder), "--hub_private"]) == 2
    assert "me/cats is public, and --hub_private was given" in capsys.readouterr().err
    assert len(hub.commits["me/cats"]) == versions


def test_a_token_that_may_only_read_is_found_out_before_training(hub, result, capsys):
    assert main(flags(result[0])) == 0
    hub.may_write = False
    assert main(flags(result[0])) == 1
    assert "the token may not write there" in capsys.readouterr().err


LOAD = """
import sys, numpy
from diffusers import StableDiffusionPipeline
pictures = []
for name in sys.argv[1:]:
    pipeline = StableDiffusionPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    import torch
    kwargs = dict(num_inference_steps=2, height=32, width=32, output_type="np")
    generator = torch.Generator().manual_seed(0)
    pictures.append(pipeline("a cat", generator=generator, **kwargs).images)
assert numpy.array_equal(*pictures), "not the same"
assert pictures[0].std() > 0
print("the same")
"""


def test_a_trained_pipeline_arrives_and_loads_by_its_name(
    hub, argv, tmp_path, monkeypatch, capsys, caplog
):
    """B.3 items 3 and 7; a round before in the background, here waited for."""
    start = BackgroundPush.start

    def start_and_wait(self, round):
        start(self, round)
        assert self._process.wait(120) == 0

    monkeypatch.setattr(BackgroundPush, "start", start_and_wait)
    options = {"hub_token": TOKEN, "hub_model_id": "cats", "hub_push_rounds": 1}
    options |= {"report_to": "tensorboard"}
    # As a shell gives them, where trackers look.
    command = [*argv(**options), "--push_to_hub", "--hub_private"]
    monkeypatch.setattr(sys, "argv", ["train_iet_sd.py", *command])
    with caplog.at_level(logging.DEBUG):
        assert train(command) == 0
    said = capsys.readouterr()
    output = tmp_path / "output"
    assert "/me/cats" in said.out
    assert hub.private == {"me/cats": True}
    _, first, last = hub.commits["me/cats"]

    parts = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
    of_parts = {f"{p}/{f.name}" for p in parts for f in (output / p).iterdir()}
    records = {"model_index.json", "README.md", "training_config.yaml", "metrics.jsonl"}
    assert set(last) == set(first) == of_parts | records | {".gitattributes"}
    assert list(output.glob("checkpoint-*"))
    assert list(output.glob("logs/**/events*"))

    assert last[UNET] == (output / UNET).read_bytes()
    average = load_file(output / "checkpoint-1" / "weights.safetensors")
    assert equal(load(first[UNET]), average)
    assert "1 of 2, training goes on" in first["README.md"].decode()
    assert 'from_pretrained("me/cats")' in last["README.md"].decode()
    assert len(first["metrics.jsonl"].splitlines()) < len(last["metrics.jsonl"].splitlines())
    assert str(tmp_path).encode() not in b"".join(last.values())
    assert not (output / ".hub").exists()

    load_it = [sys.executable, "-c", LOAD, "me/cats", str(output)]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = subprocess.run(load_it, capture_output=True, text=True)
    assert "the same" in done.stdout, done.stderr

    nowhere(TOKEN, tmp_path, said)
    assert TOKEN not in caplog.text
    assert TOKEN not in done.stdout + done.stderr + " ".join(sys.argv)


def test_a_lora_is_whole_when_the_push_fails_and_is_pushed_by_the_line_that_says_so(
    hub, argv, pipelines, tmp_path, monkeypatch, capsys
):
    hub.faults = {COMMIT: 403}
    flags = argv(train_mode="lora", hub_model_id="me/lora", hub_token=TOKEN)
    assert train([*flags, "--push_to_hub", "--save_kohya_lora"]) == 1
    said = capsys.readouterr()
    assert "Saved to" in said.out
    line = said.err.splitlines()[-1]
    output = tmp_path / "output"
    assert line.startswith("error: me/lora on the Hub: the token may not write there")
    assert f"The result is whole, in {output}; push it by python -m iet_sd push {output}" in line
    assert TOKEN not in said.out + said.err

    hub.faults = {}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(shlex.split(line.partition(" -m iet_sd ")[2])) == 0
    arrived = hub.files("me/lora")
    card = {".gitattributes", "README.md", "training_config.yaml", "metrics.jsonl"}
    assert set(arrived) == {*card, LORA, KOHYA}
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd1"])
    pipeline.load_lora_weights("me/lora", cache_dir=tmp_path / "cache")
    assert pipeline.get_active_adapters()
    here = load_file(output / LORA)
    assert equal(load(arrived[LORA]), here)
    nowhere(TOKEN, output, said)


def test_training_does_not_begin_if_it_could_not_be_pushed(
    hub, argv, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(training, "_run", None)  # where weights are loaded
    flags = [*argv(hub_model_id="me/cats", hub_token=TOKEN), "--push_to_hub"]
    later = f"push later by python -m iet_sd push {tmp_path / 'output'} --hub_model_id me/cats"
    hub.faults = {"GET /api/whoami": 401}
    assert train(flags) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--push_to_hub: me/cats on the Hub: the Hub does not accept the token" in told
    assert told.endswith(later)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert train(flags) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "HF_HUB_OFFLINE says not to go online. Or train without it, and push later" in told
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([f"--hub_tokn={TOKEN}"], ""),
        ([], f"hub_token: [{TOKEN}]"),
        ([], f"hub_token: {TOKEN}: and more"),
        ([], f"hub_token: '{TOKEN}"),
        (["--hub_token", TOKEN, "--hub_push_rounds", "1"], ""),
    ],
    ids=["name", "type", "no YAML", "no end", "contradiction"],
)
def test_no_mistake_has_the_token_told(flags, text, argv, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(text)
    assert train([*argv(), "--config", str(tmp_path / "settings.yaml"), *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert TOKEN not in said.out + said.err


def test_the_token_is_not_among_the_settings_and_a_run_goes_on_with_another(argv):
    here, there = (
        arguments.load([*argv(), "--push_to_hub", *more])
        for more in (
            ["--hub_token", TOKEN, "--hub_private", "--hub_model_id", "me/cats"],
            ["--hub_push_rounds", "1"],
        )
    )
    assert here.hub.hub_token == TOKEN
    assert TOKEN not in repr(here) + repr(here.as_dict())
    assert TOKEN not in repr(Repository("me/cats", False, TOKEN))
    assert identity(here, 1, "model", []) == identity(there, 1, "model", [])


def test_a_dry_run_makes_no_repository(hub, argv):
    assert train([*argv(hub_token=TOKEN), "--push_to_hub", "--dry_run"]) == 0
    assert not hub.requests


def test_an_evaluation_goes_into_the_card_and_with_it_to_the_hub(
    hub, argv, images, heldout, pipelines, tmp_path
):
    folder = tmp_path / "result"
    shutil.copytree(pipelines["sd1"], folder)
    trained = {"pretrained_model_name_or_path": "some/model", "train_data_dir": str(images)}
    write_card(folder, from_layers(trained, {"output_dir": str(folder)}), 16, [])
    settings = {
        "pretrained_model_name_or_path": folder,
        "train_data_dir": images,
        "heldout_data_dir": heldout,
        "resolution": 32,
        "num_inference_steps": 1,
        "num_prompts": 4,
        "embedders": "pixels",
        "quality_embedder": "none",
        "membership_samples": 0,
        "bootstrap_resamples": 10,
    }
    argv()  # resets accelerate afterwards
    assert main(["evaluate", *(f"--{k}={v}" for k, v in settings.items())]) == 0
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    card = (folder / "README.md").read_text()
    assert report["verdict"] in card
    assert "| Memorization score (pixels) | " in card
    assert main(flags(folder)) == 0
    arrived = hub.files("me/cats")
    assert report["verdict"] in arrived["README.md"].decode()
    assert {n for n in arrived if n.startswith("evaluation/")} == {
        "evaluation/report.json",
        "evaluation/report_public.html",
    }
    texts = [v for k, v in arrived.items() if not k.endswith(".safetensors")]
    assert not [text for text in texts if str(tmp_path).encode() in text]
    assert not [text for text in texts if str(images).encode() in text]
    # Neither training images nor captions, which are not to leak by what says whether they do.
    page = arrived["evaluation/report_public.html"]
    assert b"left out of this copy" in page
    assert b"4 generations of 4 prompts" in page
    assert not [leak for leak in (b"data:image", b"a cat or dog") if leak in page]
    assert b"a cat or dog" in (folder / "evaluation" / "report.html").read_bytes()


def test_the_background_is_not_waited_for_and_its_failure_is_a_warning(hub, tmp_path, caplog):
    hub.commits["me/cats"], hub.private["me/cats"] = [{}], False
    push = BackgroundPush(Repository("me/cats", False, TOKEN), tmp_path)

    def start(round):
        (push.new_folder() / LORA).write_text("weights")
        push.start(round)

    hub.faults = {COMMIT: "hold"}
    start(1)
    assert not push.is_free()
    while not any("/commit/" in request for request in hub.requests):
        time.sleep(0.01)
    assert not push.is_free()
    began = time.perf_counter()
    push.close()
    assert time.perf_counter() - began < 1
    assert not push.folder.exists()

    hub.faults = {COMMIT: 403}
    start(2)
    assert push._process.wait(60) == 1
    assert push.is_free()
    assert hub.commits["me/cats"] == [{}]
    assert "round 2 was not pushed: me/cats on the Hub: the token may not write" in caplog.text
    assert f"later: python -m iet_sd push {tmp_path} --hub_model_id me/cats" in caplog.text
    assert TOKEN not in caplog.text
    assert not push.folder.exists()
