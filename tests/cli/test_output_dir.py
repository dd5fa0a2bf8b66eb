"""What an earlier run has left in --output_dir: what is refused, what goes away, and what stays."""

from dataclasses import replace

import pytest

from iet_sd.arguments import from_layers
from iet_sd.cli.output_dir import make_way, open_checkpoint
from iet_sd.errors import UserError

RUN = [
    "model_index.json",
    "pytorch_lora_weights.safetensors",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
    "metrics.jsonl",
    "training_config.yaml",
    "README.md",
    "sample_grid.png",
    "validation-2.png",
    "validation-10.png",
    "checkpoint-2/state.json",
    "checkpoint-10/process-0-of-1/shard-0-done/state.json",
    ".checkpoint-11.partial/proxy-0.safetensors",
    ".partial/unet/config.json",
    ".hub/model_index.json",
    "logs/iet-sd-fine-tune/events.out.tfevents.1",
]
OTHERS = [
    "notes.txt",
    "checkpoint-notes.txt",
    "validation-set/1.png",
    "logs/of-another-project/events.out.tfevents.1",
    "evaluation/report.html",
    "unets/config.json",
]


@pytest.fixture
def config(tmp_path):
    def make(**given):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "data").mkdir(exist_ok=True)
        local = {
            "pretrained_model_name_or_path": str(tmp_path / "model"),
            "train_data_dir": str(tmp_path / "data"),
            "output_dir": str(tmp_path / "output"),
        }
        return from_layers(local, given)

    return make


@pytest.fixture
def output(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / "output" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        return tmp_path / "output"

    return make


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_that_a_run_wrote_goes_and_nothing_else(config, output):
    folder = output(*RUN, *OTHERS)
    make_way(config())
    assert names(folder) == {*RUN, *OTHERS}, "without being told to"
    make_way(config(overwrite_output_dir=True))
    assert names(folder) == set(OTHERS)
    assert not (folder / "unet").exists()


@pytest.mark.parametrize("logging_dir", [".", "..", "../shared"])
def test_logs_that_are_not_this_run_s_alone_stay(logging_dir, config, output):
    folder = output("model_index.json", "iet-sd-fine-tune/events", "../shared/other/events")
    make_way(config(overwrite_output_dir=True, logging_dir=logging_dir))
    assert (folder / "../shared/other/events").exists()
    assert (folder / "iet-sd-fine-tune/events").exists() == (logging_dir != ".")


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "pytorch_lora_weights.safetensors", "metrics.jsonl", "checkpoint-1/x"],
)
def test_what_a_run_has_left_is_not_written_over(name, config, output):
    output(name)
    with pytest.raises(UserError, match="holds a model or an earlier run"):
        open_checkpoint(config())
    assert open_checkpoint(config(overwrite_output_dir=True)) is None


def test_a_result_is_not_written_over_by_going_on_from_nothing(config, output):
    """As ``latest`` is also given to start a job, but not to replace a finished model."""
    output("metrics.jsonl", "training_config.yaml")
    assert open_checkpoint(config(resume_from_checkpoint="latest")) is None
    output("model_index.json")
    with pytest.raises(UserError, match="holds a model"):
        open_checkpoint(config(resume_from_checkpoint="latest"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_result_does_not_go_where_the_inputs_are(overwrite, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, what in {"model": "model", "./data": "training data"}.items():
        with pytest.raises(UserError, match=f"is the folder of the {what} to start from"):
            open_checkpoint(config(output_dir=name, overwrite_output_dir=overwrite))
    written = {"pretrained_vae_model_name_or_path": "result/vae", "output_dir": "result"}
    with pytest.raises(UserError, match="result/vae, the VAE to start from, is what a run writes"):
        open_checkpoint(config(**written, overwrite_output_dir=overwrite))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_checkpoint(config(output_dir="file", overwrite_output_dir=overwrite))


def test_a_name_on_the_hub_is_no_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(pretrained_model_name_or_path="me/cats", output_dir="me/cats")
    assert open_checkpoint(settings) is None


def test_a_link_goes_and_what_it_leads_to_stays(config, output, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("")
    folder = output("model_index.json")
    (folder / "unet").symlink_to(elsewhere)
    make_way(config(overwrite_output_dir=True))
    assert names(folder) == set()
    assert names(elsewhere) == {"config.json"}


def test_a_dry_run_asks_nothing_of_the_folder(config, output):
    output(*RUN[:3])
    settings = config()
    assert (
        open_checkpoint(replace(settings, training=replace(settings.training, dry_run=True)))
        is None
    )
