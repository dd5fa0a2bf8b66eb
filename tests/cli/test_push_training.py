"""Training that pushes its result: at the end, after rounds in the background, or not at all."""

import logging
import shlex
import subprocess
import sys
import time

import psutil
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, load_file

from iet_sd import arguments, reporting
from iet_sd.cli import train as training
from iet_sd.cli.main import main
from iet_sd.cli.train import train
from iet_sd.engine.identity import identity
from iet_sd.hub.background import BackgroundPush
from iet_sd.hub.push import Repository
from tests.cli.pushing import COMMIT, KOHYA, LORA, UNET, nowhere
from tests.compare import equal
from tests.hub_server import TOKEN
from tests.launching import ROOT

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


@pytest.fixture
def waited_for(monkeypatch):
    """Rounds are pushed in the background, and each is through before training goes on."""
    start = BackgroundPush.start

    def start_and_wait(self, round, save):
        start(self, round, save)
        assert self._push.process.wait(120) == 0

    monkeypatch.setattr(BackgroundPush, "start", start_and_wait)


def test_a_trained_pipeline_arrives_and_loads_by_its_name(
    hub, argv, tmp_path, monkeypatch, capsys, caplog, waited_for
):
    """B.3 items 3 and 7; a round before in the background."""
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


def test_a_round_takes_the_place_of_an_earlier_result_and_keeps_the_pictures_of_its_run(
    hub, argv, waited_for
):
    earlier = ("model_index.json", UNET, "evaluation/report.json", "sample_grid.png")
    others = {"LICENSE", "README.md"}
    before = dict.fromkeys((*earlier, "validation-9.png", *others), b"of before")
    hub.commits["me/cats"], hub.private["me/cats"] = [before], False
    given = {"validation_prompts": "a cat", "validation_rounds": 1, "validation_inference_steps": 1}
    given |= {"train_mode": "lora", "hub_model_id": "me/cats", "hub_token": TOKEN}
    flags = argv(**given, num_validation_images=1, num_rounds=3, hub_push_rounds=1)
    assert train([*flags, "--push_to_hub"]) == 0
    _, *rounds, last = hub.commits["me/cats"]
    records = {*others, "training_config.yaml", "metrics.jsonl", LORA}
    for number, round in enumerate(rounds, start=1):
        assert set(round) == records | {f"validation-{n}.png" for n in range(1, number + 1)}
    assert len(rounds) == 2
    assert set(last) == {*rounds[-1], "validation-3.png", "sample_grid.png"}


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
    assert line.startswith("error: me/lora on the Hub: the Hub answered with status 403 (as the te")
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


def test_a_result_is_said_to_be_whole_when_a_text_beside_it_keeps_it_from_the_hub(
    hub, argv, tmp_path, capsys
):
    report = tmp_path / "output" / "evaluation" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text("{")
    flags = argv(train_mode="lora", num_rounds=1, hub_model_id="me/lora", hub_token=TOKEN)
    assert train([*flags, "--push_to_hub"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {report} is damaged: ")
    assert "The result is whole, in " in line
    assert "push it by python -m iet_sd push " in line
    report.unlink()
    assert main([*shlex.split(line.partition(" -m iet_sd ")[2]), "--hub_token", TOKEN]) == 0
    assert LORA in hub.files("me/lora")


@pytest.mark.parametrize(
    "mistake",
    [
        {"train_data_dir": "absent"},
        {"pretrained_model_name_or_path": "me/absent"},
        {"lora_target_modules": "absent"},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_mistake_leaves_no_empty_repository(mistake, hub, argv, capsys):
    given = {"train_mode": "lora", "hub_model_id": "me/cats", "hub_token": TOKEN}
    assert train([*argv(**given | mistake), "--push_to_hub"]) == 2
    assert "absent" in capsys.readouterr().err
    assert any("auth-check" in request for request in hub.requests)
    assert not hub.commits


def test_a_repository_that_cannot_be_made_is_said_before_a_step_of_training(
    hub, argv, tmp_path, capsys
):
    hub.faults = {"POST /api/repos/create": 403}
    given = {"train_mode": "lora", "hub_model_id": "me/cats", "hub_token": TOKEN}
    assert train([*argv(**given), "--push_to_hub"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--push_to_hub: me/cats on the Hub: the token may not write there" in told
    assert f"Or train without it, and push later by python -m iet_sd push {tmp_path}" in told
    assert not list((tmp_path / "output").glob("[!.]*"))


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


def test_the_background_is_not_waited_for_and_its_failure_is_a_warning(hub, tmp_path, caplog):
    hub.commits["me/cats"], hub.private["me/cats"] = [{}], False
    push = BackgroundPush(Repository("me/cats", False, TOKEN), tmp_path)

    def start(round):
        push.start(round, lambda folder: (folder / LORA).write_text("weights"))

    hub.faults = {COMMIT: "hold"}
    start(1)
    assert not push.is_free()
    while not any("/commit/" in request for request in hub.requests):
        time.sleep(0.01)
    assert not push.is_free()
    began = time.perf_counter()
    push.close()
    assert time.perf_counter() - began < 1
    assert not (tmp_path / ".hub").exists()

    hub.faults = {COMMIT: 403}
    start(2)
    assert push._push.process.wait(60) == 1
    assert push.is_free()
    assert hub.commits["me/cats"] == [{}]
    assert (
        "round 2 was not pushed: me/cats on the Hub: the Hub answered with status 403"
        in caplog.text
    )
    assert f"later: python -m iet_sd push {tmp_path} --hub_model_id me/cats" in caplog.text
    assert TOKEN not in caplog.text
    assert not (tmp_path / ".hub").exists()


PUSHING = """
import sys, time
from pathlib import Path
from iet_sd.hub.background import BackgroundPush
from iet_sd.hub.push import Repository
push = BackgroundPush(Repository("me/cats", False, sys.argv[2]), Path(sys.argv[1]))
push.start(1, lambda folder: (folder / sys.argv[3]).write_text("weights"))
print(push._push.process.pid, flush=True)
time.sleep(600)
"""


def test_a_push_ends_with_its_run_and_the_next_begins_without_its_folder(
    hub, tmp_path, monkeypatch
):
    """After kill -9 too: else it would commit a round over what the next run pushes."""
    hub.commits["me/cats"], hub.private["me/cats"] = [{}], False
    hub.faults = {"/preupload/": "hold"}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", PUSHING, str(tmp_path), TOKEN, LORA]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        child = psutil.Process(int(run.stdout.readline()))
        while not any("/preupload/" in request for request in hub.requests):
            time.sleep(0.01)
        run.kill()
    end = time.monotonic() + 20
    # Where nobody asks for its exit status, what has ended stays as a zombie.
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
    hub.held.set()
    assert list((tmp_path / ".hub").glob("round-1-*"))
    BackgroundPush(Repository("me/cats", False, TOKEN), tmp_path)
    assert not (tmp_path / ".hub").exists()
    assert hub.commits["me/cats"] == [{}]


def test_a_round_whose_push_cannot_start_is_trained_and_kept(
    hub, argv, tmp_path, monkeypatch, caplog
):
    """As where there is no memory for another process."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent" / "python"))
    flags = argv(train_mode="lora", hub_model_id="me/cats", hub_token=TOKEN, hub_push_rounds=1)
    assert train([*flags, "--push_to_hub"]) == 0
    assert "round 1 is not pushed: [Errno 2] No such file" in caplog.text
    output = tmp_path / "output"
    assert (output / "checkpoint-1").is_dir()
    assert not (output / ".hub").exists()
    assert LORA in hub.files("me/cats")


def test_no_picture_costs_the_card_or_the_push(hub, argv, tmp_path, monkeypatch, caplog):
    def no_room(*_):
        raise torch.OutOfMemoryError("no room on the device")

    monkeypatch.setattr(reporting, "grid", no_room)
    given = {"validation_prompts": "a cat", "validation_rounds": 1, "validation_inference_steps": 1}
    given |= {"train_mode": "lora", "hub_model_id": "me/cats", "hub_token": TOKEN}
    assert train([*argv(**given, num_validation_images=1), "--push_to_hub"]) == 0
    for picture in ("validation-1.png", "validation-2.png", "sample_grid.png"):
        assert f"{picture} is not drawn: OutOfMemoryError: no room on the device" in caplog.text
        assert not (tmp_path / "output" / picture).exists()
    assert {LORA, "README.md"} <= set(hub.files("me/cats"))
