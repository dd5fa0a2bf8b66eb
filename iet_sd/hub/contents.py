"""What of a result goes to the Hub: named here, so that all else stays.

Checkpoints, caches, logs, and whatever else lies in the folder are not named, so they never go.
Nothing heavy is imported: a push is no reason to load torch.
"""

import html
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from iet_sd.errors import UserError
from iet_sd.models.origin import without_origin

CARD = "README.md"
SETTINGS = "training_config.yaml"
METRICS = "metrics.jsonl"
GRID = "sample_grid.png"
FRONTIER = "frontier.png"
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
"""Beside a LoRA that draws otherwise than its base."""
LORAS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors")
BESIDE = ("best", "merged")
"""Folders of other results that a run saves within its own."""
EVALUATION = "evaluation"
REPORT, PAGE = f"{EVALUATION}/report.json", f"{EVALUATION}/report_public.html"
"""What is pushed of an evaluation: of its pages the one without training images and captions."""
PENDING = ".hub"
"""Folder of a round's result, under --output_dir, while it is pushed."""
STAND_IN = "path/to/this/folder"
"""What a card on disk calls the place of the result; on the Hub its name is known."""
EVALUATED = "<!-- iet_sd: evaluation {} -->"
"""A card of ours names by this the evaluation that it tells of, by its date."""
PARTS = (
    *("unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder"),
    *("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
)
"""Names of the parts that pipelines of ours may have."""
_PICTURES = re.compile(r"sample_grid\.png|validation-\d+\.png|frontier\.png")
_PARTS = (".json", ".txt", ".safetensors")
_SOURCES = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "lora_weights"),
    *("dataset_name", "embedders", "quality_embedder", "eval_embedder", "clip_score", "name"),
)
"""Settings that are an id on the Hub, or a path."""
_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_CONFIG = re.compile(r"--config[= ](\S+)")


def contents(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Files of the result in ``folder`` by their name on the Hub, or as bytes what they hold there.

    Texts lose the folders of this machine, and the card has the name of the repository in its
    example. Errors: `UserError` if there is no pipeline and no LoRA, or not all of one, or a text
    is damaged.
    """
    found: dict[str, Path | bytes] = {path.name: path for path in _weights(folder)}
    if (folder / INDEX).is_file():
        for part in _parts(folder):
            files = sorted(f for f in (folder / part).iterdir() if f.suffix in _PARTS)
            found |= {f"{part}/{file.name}": file for file in files if _is_plain(file)}
    elif (folder / SCHEDULER).is_file():
        found[SCHEDULER] = folder / SCHEDULER
    for name in [name for name in found if name.endswith(".json")]:
        found[name] = _nameless(found[name])
    pictures = sorted(f for f in folder.iterdir() if _PICTURES.fullmatch(f.name))
    for file in (folder / METRICS, *pictures):
        if _is_plain(file):
            found[file.name] = file
    if (folder / CARD).is_file():
        found[CARD] = _text(folder / CARD).replace(STAND_IN, repo_id).encode()
    if (folder / SETTINGS).is_file():
        settings = _mapping(folder / SETTINGS, yaml.safe_load)
        found[SETTINGS] = yaml.safe_dump(
            _without(settings, _places(settings)), sort_keys=False, allow_unicode=True
        ).encode()
    return found | _evaluation(folder)


def may_be_ours(name: str) -> bool:
    """Whether a push may have put a file of this name on the Hub; the card may be another's.

    What a result has of these, and a later one by the same name has not, belongs to no model there.
    """
    folder, _, file = name.rpartition("/")
    if not folder:
        own = name in (INDEX, *LORAS, SETTINGS, METRICS)
        return own or _PICTURES.fullmatch(name) is not None
    if folder == EVALUATION:
        return name in (REPORT, PAGE) or file.endswith(".png")
    return folder in PARTS and file.endswith(_PARTS)


def is_evaluated(folder: Path) -> bool:
    """Whether an evaluation lies in ``folder``, and of these weights as far as the card knows.

    A card of ours is written with the weights and tells of their evaluation once there is one: a
    report that it doesn't tell of is of weights that were there before.
    """
    if not (folder / REPORT).is_file():
        return False
    card = _text(folder / CARD) if (folder / CARD).is_file() else ""
    is_ours = EVALUATED.partition("{")[0] in card
    created = _mapping(folder / REPORT, json.loads).get("created")
    return not is_ours or EVALUATED.format(created) in card


def _weights(folder: Path) -> Iterator[Path]:
    """The files that make a folder a result."""
    found = [folder / name for name in (INDEX, *LORAS) if (folder / name).is_file()]
    if not found:
        names = sorted(e.name for e in folder.iterdir())[:8] if folder.is_dir() else None
        raise UserError(
            f"{folder} is no result: expected {INDEX} of a pipeline or {LORAS[0]} in it, "
            + ("and there is no such folder." if names is None else f"found {names or 'nothing'}.")
            + " Give the --output_dir of a training run that has ended."
        )
    yield from found


def _parts(folder: Path) -> list[str]:
    """Names of the parts of a pipeline, all there."""
    index = _mapping(folder / INDEX, json.loads)
    parts = [name for name, entry in index.items() if isinstance(entry, list) and all(entry)]
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"{folder} is no whole pipeline: {INDEX} names {part}/, not there.")
    return parts


def _nameless(config: Path) -> bytes:
    """A config without the place it was loaded from: results of before, and of others, name it."""
    try:
        return without_origin(config)
    except (OSError, ValueError) as error:
        raise UserError(_damaged(config, error)) from error


def _text(path: Path) -> str:
    """Errors: `UserError` for what is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(_damaged(path, error)) from error


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Errors: `UserError` for what is anything else."""
    text = _text(path)
    try:
        content = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(_damaged(path, error)) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(_damaged(path, "it has no values by their names"))
    return content


def _damaged(path: Path, why: object) -> str:
    return f"{path} is damaged: {' '.join(str(why).split()).rstrip('.')}. Mend or remove it."


def _evaluation(folder: Path) -> dict[str, Path | bytes]:
    """The report; not the tables of all images, which are as long as the data."""
    if not is_evaluated(folder):
        return {}
    report = _mapping(folder / REPORT, json.loads)
    settings, model = (report.get(name) for name in ("settings", "model"))
    if not (isinstance(settings, dict) and isinstance(model, dict)):
        raise UserError(_damaged(folder / REPORT, "it has no settings, or no model"))
    names = _places(settings | model, str(report.get("command", "")))
    public = _without(report, names)
    found: dict[str, Path | bytes] = {
        REPORT: (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode(),
        **{f"{EVALUATION}/{f.name}": f for f in sorted((folder / EVALUATION).glob("*.png"))},
    }
    if (folder / PAGE).is_file():
        page = _text(folder / PAGE)
        found[PAGE] = _without(page, {html.escape(k): html.escape(v) for k, v in names.items()})
        found[PAGE] = found[PAGE].encode()
    return found


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def shown(name: str) -> str:
    """A name without the folders of this machine."""
    return Path(name).expanduser().resolve().name if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder here, or could be of no other thing."""
    try:
        path = Path(name).expanduser()
        return path.is_absolute() or path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, of no user, or with a zero: a prompt
        return False


def _places(settings: dict[str, Any], command: str = "") -> dict[str, str]:
    """The paths among settings, by what to say instead; longest first.

    By the field where that tells: a push may run in another folder than training did, or on
    another machine, where a relative path leads nowhere. ``command``: its --config is one too.
    """
    paths = set(_CONFIG.findall(command))
    for field, value in settings.items():
        for text in value if isinstance(value, list) else [value]:
            # An embedder may be given as NAME=FILE.
            path = re.sub(r"^\w+=", "", text) if isinstance(text, str) else ""
            if _is_path(field, path):
                paths.add(path)
    paths = {path for path in paths if re.search(r"[/\\~]", path)}
    return {path: _last_name(path) for path in sorted(paths, key=len, reverse=True)}


def _is_path(field: str, text: str) -> bool:
    """Whether the value of a setting is a path, wherever that leads from here."""
    by_nature = field.endswith("_dir") or field == "resume_from_checkpoint"
    return by_nature or is_local(text) or (field in _SOURCES and not _ID.fullmatch(text))


def _last_name(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def _without(value: Any, places: dict[str, str]) -> Any:
    """``value``, a text or JSON, with other names for places."""
    if isinstance(value, dict):
        return {key: _without(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, places) for item in value]
    if isinstance(value, str):
        for place, name in places.items():
            value = value.replace(place, name)
    return value
