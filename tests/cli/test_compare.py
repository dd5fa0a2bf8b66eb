"""``python -m iet_sd compare``, from end to end, on evaluations of tiny pipelines."""

import json
import re
import shutil

import pytest

from iet_sd.cli.main import main
from tests.cli.reports import report_of


@pytest.fixture
def evaluated(flags, pipelines, tmp_path):
    """Folders of two evaluations: of two models on the same prompts."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder, kind in zip(folders, ("sd1", "sd2"), strict=True):
        model = pipelines[kind]
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
