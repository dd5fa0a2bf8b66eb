"""The Hub, by its real client and a server on this machine: what arrives, and what never does."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import constants

from iet_sd import probing
from iet_sd.arguments import from_layers
from iet_sd.cli.main import main
from iet_sd.hub import contents as hub_contents
from iet_sd.hub.card import write_card
from iet_sd.models import saving
from iet_sd.models.family import PARTS
from tests.cli.pushing import COMMIT, KOHYA, LORA, UPLOAD, flags, nowhere
from tests.hub_server import TOKEN


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
    assert set(hub_contents.PARTS) == set(PARTS)
    assert hub_contents.BESIDE == (probing.BEST, saving.MERGED)


def test_the_name_of_the_folder_and_the_token_of_a_login(hub, result, monkeypatch, tmp_path):
    folder, _ = result
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN + "\n")
    assert main(flags(folder, hub_token=None, hub_model_id=None)) == 0
    (tmp_path / "hf" / "token").unlink()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(flags(folder, hub_token=None, hub_model_id="other")) == 0
    assert set(hub.commits) == {"me/result", "me/other"}


def test_a_push_deletes_what_an_earlier_one_put_there_and_nothing_of_others(hub, result, capsys):
    folder, _ = result
    assert main(flags(folder)) == 0
    assert "deleted" not in capsys.readouterr().out
    others = {"LICENSE", "notes/mine.png", "unet/notes.md", "evaluation/mine.csv", "mine.png"}
    first = hub.files("me/cats")
    hub.commits["me/cats"].append(first | dict.fromkeys(others, b"a user's"))
    lora = folder.parent / "lora"
    lora.mkdir()
    for name in ("README.md", "training_config.yaml", "validation-2.png"):
        shutil.copy(folder / name, lora)
    (lora / LORA).write_text("weights")
    assert main(flags(lora)) == 0
    kept = {"README.md", "training_config.yaml", "validation-2.png", LORA, ".gitattributes"}
    assert set(hub.files("me/cats")) == kept | others
    gone = len(set(first) - kept)
    assert f"/me/cats, and deleted {gone} of an earlier push\n" in capsys.readouterr().out
    # And a pipeline takes the place of a LoRA.
    assert main(flags(folder)) == 0
    assert set(hub.files("me/cats")) == set(first) | others


def of_run(folder, **settings):
    """Have a folder be that of a run with these settings."""
    (folder / "training_config.yaml").write_text(yaml.safe_dump(settings))


def test_a_run_is_pushed_by_its_own_name_and_as_private_as_it_said(hub, result):
    folder, _ = result
    of_run(folder, hub_private=True, hub_model_id="me/secret")
    assert main(flags(folder, hub_model_id=None)) == 0
    assert hub.private == {"me/secret": True}
    assert main([*flags(folder, hub_model_id="me/shown"), "--no-hub_private"]) == 0
    assert hub.private == {"me/secret": True, "me/shown": False}
    of_run(folder, hub_private=True, hub_model_id=None)
    assert main(flags(folder, hub_model_id=None)) == 0
    assert hub.private["me/result"]


def test_other_results_of_a_run_have_names_of_their_own(hub, result):
    folder, _ = result
    inner = {"best": "-best", "merged": "-merged", "best/merged": "-best-merged"}
    for name in inner:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / LORA).write_text("weights")
    of_run(folder / "best", hub_model_id="me/secret")
    for model, name in ((None, "me/result"), ("me/secret", "me/secret")):
        of_run(folder, hub_private=True, hub_model_id=model)
        for path, suffix in inner.items():
            assert main(flags(folder / path, hub_model_id=None)) == 0
            assert hub.private[f"{name}{suffix}"]
    assert len(hub.commits) == 6
    # Not within a run: as any other.
    (folder / "training_config.yaml").unlink()
    assert main(flags(folder / "merged", hub_model_id=None)) == 0
    assert "me/merged" in hub.commits


FAULTS = {
    "nobody there": ("me/cats", None, "it cannot be reached (ConnectError"),
    "token": ("me/cats", {"GET /api/whoami": 401}, "the Hub does not accept the token"),
    "no right": ("them/cats", {}, "the token may not write there"),
    "error at once": ("me/cats", {"GET /api/whoami": 503}, "the Hub answered with status 503"),
    "full": ("me/cats", {COMMIT: 403}, "the Hub answered with status 403 (as the test says)"),
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


DAMAGE = {
    "training_config.yaml": (b"", b"a: [1", b"1: 2", b"\xff"),
    "model_index.json": (b"", b"{", b"[]", b"\xff"),
    "unet/config.json": (b'{"_name_or_path": ', b'"name_or_path" \xff'),
    "README.md": (b"\xff",),
    "evaluation/report.json": (b"", b"{", b"[]", b"{}", b"[" * 100000),
    "evaluation/report_public.html": (b"\xff",),
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, ts in DAMAGE.items() for t in ts])
def test_a_damaged_text_is_one_line_that_names_it(name, text, hub, result, capsys):
    folder, _ = result
    (folder / name).write_bytes(text)
    assert main(flags(folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(folder / name) in line
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
    for name in ("me/cats", "me/others"):
        assert main(flags(result[0], hub_model_id=name)) == 1
        assert f"{name} on the Hub: the token may not write there" in capsys.readouterr().err
    assert hub.requests.count("POST /api/repos/create") == 1


def test_a_repository_of_an_organization(hub, result):
    assert main(flags(result[0], hub_model_id="us/cats")) == 0
    assert set(hub.commits) == {"us/cats"}


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
