"""``python -m iet_sd`` evaluate and generate, from end to end, on tiny pipelines."""

import shutil

import pyarrow.parquet as parquet
import pytest
import yaml
from PIL import Image, ImageOps

from iet_sd.arguments import load
from iet_sd.cli.main import main
from iet_sd.config import EvaluateSettings
from iet_sd.evaluation import generate as generate_module
from iet_sd.evaluation import run, sets
from iet_sd.evaluation.features import embed
from tests.cli.reports import report_of
from tests.launching import Launched
from tests.pipelines import RESOLUTION


def without_time(folder):
    return {k: v for k, v in report_of(folder).items() if k not in ("created", "command")}


def test_an_evaluation_leaves_a_report(flags, tmp_path, capsys):
    assert main(flags()) == 0
    folder = tmp_path / "evaluation"
    report = report_of(folder)
    names = {m["name"] for m in report["measures"]}
    assert {
        "excess_score",
        "memorization_score",
        "own_similarity",
        "background_p95",
        "heldout_p95",
        "l2_copies",
        "authentic",
        "c_t",
        "membership_auc",
        "loss_gap",
        "kid",
        "fid",
        "vendi",
    } <= names
    assert report["verdict"] in capsys.readouterr().out
    assert report["data"]["train"]["count"] == 16
    assert report["data"]["heldout"]["count"] == 30
    pairs = parquet.read_table(folder / "pairs.parquet").to_pylist()
    assert len(pairs) == 32
    assert {pair["prompt"] for pair in pairs} == {f"a cat or dog {i}" for i in range(16)}
    rows = parquet.read_table(folder / "images.parquet").to_pylist()
    assert [row["set"] for row in rows] == ["train"] * 16 + ["heldout"] * 30
    assert sum(row["loss"] is not None for row in rows) == 16
    assert "a cat or dog 3" in (folder / "report.html").read_text("utf-8")


def test_a_second_run_draws_nothing_and_says_the_same(flags, tmp_path, monkeypatch):
    assert main(flags()) == 0
    first = without_time(tmp_path / "evaluation")

    def draw(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(generate_module, "draw", draw)
    assert main(flags(generation_batch_size=3)) == 0
    second = without_time(tmp_path / "evaluation")
    assert second.pop("settings") | {"generation_batch_size": 8} == first.pop("settings")
    assert second == first
    # Another measure does not draw either.
    assert main(flags(embedders="raw_pixels")) == 0


def test_faiss_finds_the_same(flags, tmp_path):
    pytest.importorskip("faiss")
    assert main(flags(quality_embedder="none")) == 0
    first = without_time(tmp_path / "evaluation")
    assert main(flags(quality_embedder="none", neighbour_engine="faiss")) == 0
    second = without_time(tmp_path / "evaluation")
    assert second.pop("settings") | {"neighbour_engine": "exact"} == first.pop("settings")
    assert second == first


def test_generate_draws_what_evaluate_draws(flags, tmp_path, monkeypatch, capsys):
    assert main(flags("generate", heldout_data_dir=None)) == 0
    assert "32 images" in capsys.readouterr().out
    monkeypatch.setattr(generate_module, "draw", None)
    assert main(flags()) == 0


def test_what_needs_more_images_is_left_out_with_a_warning(flags, tmp_path):
    assert main(flags(num_prompts=2)) == 0
    found = {m["name"]: m for m in report_of(tmp_path / "evaluation")["measures"]}
    for name in ("c_t", "kid", "precision", "recall", "density", "coverage"):
        assert found[name]["value"] is None
        assert "Use more" in found[name]["warning"] or "more images" in found[name]["warning"]
    assert found["fid"]["value"] is not None


def test_each_embedder_sees_what_is_measured_by_it_and_no_more(flags, tmp_path, monkeypatch):
    seen = []

    def counting(embedder, images, *given, flip, **more):
        seen.append((embedder.name, len(images), flip))
        return embed(embedder, images, *given, flip=flip, **more)

    monkeypatch.setattr(sets, "embed", counting)
    assert main(flags(num_prompts=7)) == 0
    generated, train, heldout, both = 14, 16, 30, (False, True)
    quality = "python=tests.few_features:quadrants"
    assert sorted(seen) == sorted(
        [
            *(("pixels", count, flip) for count in (generated, train, heldout) for flip in both),
            *(("raw_pixels", count, flip) for count in (generated, heldout) for flip in both),
            ("raw_pixels", train, False),
            *((quality, count, False) for count in (generated, heldout)),
        ]
    )


def test_only_what_similarity_is_measured_by_can_be_prepared_as_by_dcr(flags):
    given = {"embedders": "clip=a/b", "preprocessing": "legacy_dcr", "clip_score": "a/b"}
    settings = load(flags(**given)[1:], EvaluateSettings, "evaluate")
    as_they_are = {("generated", False), ("heldout", False)}
    uses = run._uses(settings)
    assert uses["clip=a/b", "recommended"] == {("generated", False)}
    assert len(uses["clip=a/b", "legacy_dcr"]) == 6
    assert uses["python=tests.few_features:quadrants", "recommended"] == as_they_are
    # One that is used for both sees what either needs.
    settings = load(flags(quality_embedder="pixels")[1:], EvaluateSettings, "evaluate")
    assert {use: len(views) for use, views in run._uses(settings).items()} == {
        ("pixels", "recommended"): 6,
        ("raw_pixels", "recommended"): 5,
    }


def test_prompts_of_ones_own_have_no_own_image(flags, tmp_path):
    argv = flags(images_per_prompt=12)
    assert main([*argv, "--prompts", "a cat", "a dog", "a <b>bird</b>"]) == 0
    names = {m["name"] for m in report_of(tmp_path / "evaluation")["measures"]}
    assert "own_similarity" not in names
    pairs = parquet.read_table(tmp_path / "evaluation" / "pairs.parquet").to_pylist()
    assert {pair["own_similarity"] for pair in pairs} == {None}


def test_two_processes_equal_one(flags, tmp_path):
    # In a process of its own, another package of the name tests hides ours and its embedder.
    given = {"quality_embedder": "none"}
    alone = Launched(flags(output_dir=tmp_path / "one", **given), 0, ("-m", "iet_sd"))
    both = Launched(flags(output_dir=tmp_path / "two", **given), 2, ("-m", "iet_sd"))
    assert (alone.wait(), both.wait()) == (0, 0), alone.output() + both.output()
    one, two = without_time(tmp_path / "one"), without_time(tmp_path / "two")
    assert one.pop("settings") != two.pop("settings")  # the folder
    for a, b in zip(one.pop("measures"), two.pop("measures"), strict=True):
        assert a["name"] == b["name"]
        # Batches mix other images, and pixels may round to the neighbouring level.
        assert a["value"] == pytest.approx(b["value"], rel=0.02, abs=0.02), a["name"]


def test_sdxl_is_evaluated_by_the_same_command(flags, pipelines, tmp_path):
    assert main(flags(pretrained_model_name_or_path=pipelines["sdxl"], num_prompts=6)) == 0
    values = {m["name"]: m["value"] for m in report_of(tmp_path / "evaluation")["measures"]}
    assert 0 < values["heldout_loss"] < 10
    assert 0 <= values["membership_auc"] <= 1
    assert 0 < values["memorization_score"] <= 1


def test_settings_of_training_need_not_be_repeated(pipelines, images, heldout, flags, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pipelines["sd1"], model)
    trained = {
        "pretrained_model_name_or_path": "some/base",
        "train_data_dir": str(images),
        "heldout_data_dir": str(heldout),
        "resolution": RESOLUTION,
        "learning_rate": 1e-4,
        "caption_prefix": "a photo:",
    }
    (model / "training_config.yaml").write_text(yaml.safe_dump(trained))
    place = dict.fromkeys(("train_data_dir", "heldout_data_dir", "resolution", "output_dir"))
    assert main(flags(pretrained_model_name_or_path=model, **place)) == 0
    report = report_of(model / "evaluation")
    assert report["settings"]["resolution"] == RESOLUTION
    assert report["data"]["heldout"]["count"] == 30
    pairs = parquet.read_table(model / "evaluation" / "pairs.parquet").to_pylist()
    assert {p["prompt"] for p in pairs} <= {f"a photo: a cat or dog {i}" for i in range(16)}


def test_without_heldout_images_only_on_request(flags, tmp_path, capsys):
    assert main(flags(heldout_data_dir=None)) == 2
    assert "--without_heldout" in capsys.readouterr().err
    assert main([*flags(heldout_data_dir=None), "--without_heldout"]) == 0
    report = report_of(tmp_path / "evaluation")
    assert report["data"]["heldout"] is None
    assert not [m["name"] for m in report["measures"] if "excess" in m["name"]]
    assert "chance" in report["verdict"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_data_dir": "nowhere"}, "nowhere"),
        ({"train_data_dir": None}, "Name the training data"),
        ({"heldout_data_dir": "nowhere"}, "nowhere"),
        ({"heldout_data_dir": None, "heldout_split": "foo"}, "--heldout_split foo"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere"),
        ({"pretrained_model_name_or_path": "./nowhere", "train_data_dir": None}, "no folder"),
        ({"output_dir": f"{__file__}/x"}, "--output_dir"),
        ({"output_dir": __file__}, "is a file"),
        ({"evaluation_cache_dir": __file__}, "--evaluation_cache_dir"),
        ({"lora_weights": "nowhere"}, "--lora_weights"),
        ({"embedders": "sscd"}, "sscd"),
        ({"embedders": "torchscript=nowhere.pt"}, "nowhere.pt"),
        ({"num_prompts": 0}, "--num_prompts"),
        ({"num_prompts": 1}, "at least 2 prompts"),
        ({"prompts": "a cat", "images_per_prompt": 24}, "at least 2 prompts"),
        ({"membership_samples": 1}, "--membership_samples must be 0 or at least 2"),
        ({"quality_embedder": "clip"}, "clip=ID_OR_FOLDER"),
        ({"confidence_level": 1.5}, "--confidence_level"),
        ({"max_train_samples": 1}, "least 2"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(flags, capsys, given, said):
    assert main(flags(**given)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert said in error[0]


@pytest.mark.parametrize("saved_anew", [False, True], ids=["bytes", "pixels"])
def test_heldout_images_that_were_trained_on_are_refused(
    flags, heldout, images, tmp_path, monkeypatch, capsys, saved_anew
):
    mixed = tmp_path / "mixed"
    shutil.copytree(heldout, mixed)
    for number in (3, 5):
        copy = mixed / f"{number:02d}.png"
        shutil.copy(images / copy.name, copy)
        if saved_anew:
            Image.open(copy).save(copy, compress_level=0)
    # Of a mirror image nothing is said: it is another one.
    ImageOps.mirror(Image.open(images / "07.png")).save(mixed / "07.png")
    monkeypatch.setattr(generate_module, "draw", None)
    for check in ("all", "none"):
        assert main(flags(heldout_data_dir=mixed, check_images=check)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "2 of 30 held-out images" in error
        assert "03.png (training image 03.png), 05.png (training image 05.png)" in error


def test_an_embedder_that_cannot_be_had_fails_before_anything_is_drawn(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(generate_module, "draw", None)
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    assert main(flags(quality_embedder=f"inception={tmp_path / 'weights.pth'}")) == 2
    assert "weights.pth" in capsys.readouterr().err
    assert not list(tmp_path.rglob("request.json"))


def test_generate_needs_training_data_for_captions_alone(flags, tmp_path, capsys):
    none = {"train_data_dir": None, "heldout_data_dir": None}
    assert main(flags("generate", prompts="dog", **none)) == 0
    assert "2 images" in capsys.readouterr().out
    assert main(flags("generate", **none)) == 2
    assert "Name the training data" in capsys.readouterr().err


def test_without_heldout_contradicts_held_out_images_given_but_not_trained_beside(
    pipelines, images, flags, tmp_path, capsys
):
    assert main([*flags(), "--without_heldout"]) == 2
    assert "--heldout_data_dir" in capsys.readouterr().err
    model = tmp_path / "model"
    shutil.copytree(pipelines["sd1"], model)
    (model / "training_config.yaml").write_text("heldout_split: test\n")
    given = {"pretrained_model_name_or_path": model, "quality_embedder": "none"}
    assert main([*flags(**given, heldout_data_dir=None), "--without_heldout"]) == 0
    # What is given takes the place of what was trained beside.
    assert main(flags(**given)) == 0


def test_long_prompts_are_one_line(flags, capsys, caplog):
    captions = ["a cat " * 30, "a dog", "a bird " * 40]
    assert main([*flags("generate"), "--prompts", *captions]) == 0
    said = capsys.readouterr()
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [line for line in lines if "2 of 3 prompts are longer than" in line]
    assert "truncated" not in said.out + said.err + caplog.text
    assert "Token indices" not in said.err + caplog.text


def test_ctrl_c_is_one_line(flags, monkeypatch, capsys):
    def draw(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "draw", draw)
    assert main(flags()) == 130
    stopped = [line for line in capsys.readouterr().err.splitlines() if "Stopped" in line]
    assert stopped == [
        "Stopped by SIGINT. Run again to go on: what was drawn and embedded is kept."
    ]


def test_unknown_commands_and_help(capsys):
    assert main(["evaluat"]) == 2
    assert "evaluate" in capsys.readouterr().err
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out
