"""``python -m iet_sd compare``, from end to end, on evaluations of tiny pipelines."""

import json
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from iet_sd.cli.main import main
from tests.cli.reports import report_of


def changed(pipeline, part, folder):
    """A copy of a pipeline with other weights in one part."""
    shutil.copytree(pipeline, folder)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.fixture
def evaluated(flags, pipelines, tmp_path):
    """Folders of two evaluations: of two models on the same prompts."""
    folders = tmp_path / "a", tmp_path / "b"
    models = pipelines["sd1"], changed(pipelines["sd1"], "unet", tmp_path / "changed")
    for folder, model in zip(folders, models, strict=True):
        assert main(flags(pretrained_model_name_or_path=model, output_dir=folder)) == 0
    return [str(folder) for folder in folders]


def test_compare_pairs_two_models(evaluated, tmp_path, capsys):
    capsys.readouterr()
    output = str(tmp_path / "comparison")
    resamples = ["--bootstrap_resamples", "200"]
    assert main(["compare", *evaluated, "--output_dir", output, *resamples]) == 0
    said = capsys.readouterr().out
    assert "excess similarity" in said
    assert "KID" in said
    content = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    scores = [
        next(m["value"] for m in report_of(tmp_path / x)["measures"] if m["name"] == "excess_score")
        for x in "ab"
    ]
    difference = content["results"]["excess_score"]["difference"]
    assert difference["value"] == pytest.approx(scores[0] - scores[1])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert content["results"]["heldout_loss"]["difference"]["value"] != 0
    assert content["pairs"] == 32
    assert "-" not in "".join(re.findall(r"\S*\d\.\d{4}\S*", said))  # the sign of tables is −
    # With itself a model differs in nothing.
    capsys.readouterr()
    shutil.copytree(evaluated[0], tmp_path / "copy")
    assert main(["compare", evaluated[0], str(tmp_path / "copy"), *resamples]) == 0
    assert "+0.0000 [+0.0000, +0.0000]" in (said := capsys.readouterr().out)
    assert "−0.0000" not in said
    assert main(["compare", evaluated[0], f"{evaluated[0]}/../a"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "the same evaluation" in line


def test_compare_refuses_what_is_not_paired(evaluated, flags, tmp_path, capsys):
    other = tmp_path / "other"
    assert main(flags(output_dir=other, guidance_scale=2, seed=1)) == 0
    capsys.readouterr()
    assert main(["compare", evaluated[0], str(other)]) == 2
    said = capsys.readouterr().err
    assert "guidance_scale" in said
    assert "seed" in said
    assert main(["compare", evaluated[0], str(tmp_path)]) == 2
    assert "not the folder of an evaluation" in capsys.readouterr().err
    (other / "pairs.parquet").write_bytes(b"no parquet")
    assert main(["compare", str(other), evaluated[0]]) == 2
    assert "not the folder of an evaluation" in capsys.readouterr().err


@pytest.fixture
def compared(flags, tmp_path, comparison):
    """Evaluates with two lots of flags, and some for both, and compares."""

    def run(first, second, *more):
        folders = tmp_path / "a", tmp_path / "b"
        shared = {"num_prompts": 4, "images_per_prompt": 1, "quality_embedder": "none"}
        shared["evaluation_cache_dir"] = tmp_path / "cache"
        for folder, given in zip(folders, (first, second), strict=True):
            assert main([*flags(**{"output_dir": folder} | shared | given), *more]) == 0
            AcceleratorState._reset_state(reset_partial_state=True)
        return comparison(*folders)

    return run


@pytest.fixture
def comparison(tmp_path, capsys):
    """Compares two folders: exit status, what is said, and comparison.json."""

    def run(*folders):
        output = tmp_path / "comparison"
        capsys.readouterr()
        argv = [*map(str, folders), "--output_dir", str(output), "--bootstrap_resamples", "100"]
        status = main(["compare", *argv])
        said = "".join(capsys.readouterr())
        return (
            status,
            said,
            json.loads((output / "comparison.json").read_text()) if not status else {},
        )

    return run


class Pooled(torch.nn.Module):
    """The mean of each channel, or its opposite."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, x):
        return self.sign * x.mean((2, 3))


def test_compare_refuses_networks_that_share_a_name_alone(compared, tmp_path):
    files = [tmp_path / name / "net.pt" for name in ("wa", "wb")]
    for file, sign in zip(files, (1.0, -1.0), strict=True):
        file.parent.mkdir()
        torch.jit.trace(Pooled(sign), torch.zeros(1, 3, 8, 8)).save(file)
    given = [{"embedders": f"torchscript={file}"} for file in files]
    status, said, _ = compared(*given)
    assert status == 2
    name = r"torchscript=net.pt \(\w{8}\)"
    assert re.search(f"embedder: {name} and {name}", said)
    # In another folder a network is the same.
    shutil.copy(*files)
    assert compared(*given)[0] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"negative_prompt": "a dog"}, "settings.negative_prompt: '' and 'a dog'"),
        ({"mixed_precision": "bf16"}, "model.dtype: 'float32' and 'bfloat16'"),
        ({"group_column": "group"}, "other groups of held-out images (--group_column)"),
    ],
    ids=str,
)
def test_compare_refuses_what_differs_in_more_than_the_model(
    compared, images, heldout, tmp_path, given, said
):
    places = {}
    for name, folder in (("train_data_dir", images), ("heldout_data_dir", heldout)):
        places[name] = shutil.copytree(folder, tmp_path / name)
        rows = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
        rows = [row | {"group": f"{number // 2}"} for number, row in enumerate(rows)]
        (places[name] / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, error, _ = compared(places, places | given)
    assert status == 2
    assert f"the model: {said}. Evaluate both" in error  # and in nothing else


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"membership_timesteps": 5}, "losses.timesteps: 2 and 5"),
        ({"membership_samples": 6}, "losses.samples: 8 and 6; losses.names: "),
        ({"membership_samples": 0}, "losses.samples: 8 and None; "),
        ({"caption_prefix": "a photo:"}, "losses.captions: "),
    ],
    ids=str,
)
def test_compare_leaves_out_losses_that_were_taken_otherwise(compared, given, said):
    status, text, content = compared({}, given, "--prompts", "a cat", "a dog")
    assert status == 0
    assert f"held-out loss left out: the evaluations differ in {said}" in text
    assert list(content["left_out"]) == ["heldout_loss"]
    assert content["left_out"]["heldout_loss"] in text
    assert {"excess_score", "l2_copies"} <= set(content["results"])
    assert "heldout_loss" not in content["results"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sd2", "losses.prediction_type: 'epsilon' and 'v_prediction'"),
        ("vae", "losses.vae: "),
        ("betas", "losses.noise_levels: "),
    ],
)
def test_losses_of_another_kind_of_model_are_not_compared(
    kind, said, pipelines, compared, tmp_path
):
    """Of another target, noise or latents: their difference says nothing of quality."""
    if kind == "sd2":
        other = pipelines["sd2"]
    elif kind == "vae":
        other = changed(pipelines["sd1"], "vae", tmp_path / "other")
    else:
        other = shutil.copytree(pipelines["sd1"], tmp_path / "other")
        file = other / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    places = [{"pretrained_model_name_or_path": model} for model in (pipelines["sd1"], other)]
    status, _, content = compared(*places)
    assert status == 0
    assert list(content["left_out"]) == ["heldout_loss"]
    assert said in content["left_out"]["heldout_loss"]


def test_what_neither_has_is_not_missed(compared):
    status, said, content = compared(*[{"membership_samples": 0}] * 2)
    assert (status, content["left_out"]) == (0, {})
    assert "left out" not in said


def test_compare_tells_why_kid_is_missing(flags, tmp_path, comparison):
    real = tmp_path / "real" / "deep"
    real.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(real, target_is_directory=True)
    for name in "abc":
        given = {"quality_embedder": "none"} if name == "c" else {}
        place = {"output_dir": link / name, "evaluation_cache_dir": tmp_path / "cache" / name}
        assert main(flags(num_prompts=4, membership_samples=0, **place, **given)) == 0
    # By the link, and by where it leads to.
    for folder in (link, real):
        status, said, content = comparison(folder / "a", folder / "b")
        assert (status, content["left_out"]) == (0, {})
        assert "KID +0.00000" in said
        assert content["kid_difference"]["value"] == 0
    _, said, content = comparison(link / "a", link / "c")
    embedders = "'python=tests.few_features:quadrants' and None"
    assert f"differ in quality_features.embedder.name: {embedders}" in content["left_out"]["kid"]
    assert content["left_out"]["kid"] in said
    assert content["kid_difference"] is None
    shutil.rmtree(tmp_path / "cache" / "b")
    status, said, content = comparison(link / "a", link / "b")
    assert status == 0
    assert "KID left out: the features of " in said
    assert " are gone (" in content["left_out"]["kid"]
    assert "features.npy" in content["left_out"]["kid"]
