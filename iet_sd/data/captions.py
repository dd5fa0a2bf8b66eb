"""What counts as a caption, and what a visit reads of it."""

from typing import Any

import torch

from iet_sd.config import DataConfig
from iet_sd.data.shards import Visit
from iet_sd.errors import UserError


def texts(value: Any, name: str) -> list[str]:
    """The captions in a cell: a text or a list of texts, without empty ones; [] if missing.

    name: what to call the sample in an error.
    Errors: `UserError` for anything but texts.
    """
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not (entry is None or isinstance(entry, str)):
            raise UserError(
                f"{name}: a caption must be a text or a list of texts; got {entry!r:.60}. "
                "Is --caption_column the right column?"
            )
    return [entry.strip() for entry in entries if entry and entry.strip()]


def readable(captions: list[str], config: DataConfig) -> set[str]:
    """All that `draw` may give for a sample with these captions, without ``shuffle_caption``."""
    found = {prefixed(caption, config) for caption in captions or [""]}
    return found | ({""} if config.proportion_empty_prompts else set())


def draw(captions: list[str], config: DataConfig, visit: Visit) -> str:
    """What the visit reads: one of the captions, its tags shuffled, or nothing, as settings say.

    Each of these draws is one of its own, so that no setting changes what another one draws.
    """
    if torch.rand((), generator=visit.generator("caption/empty")) < config.proportion_empty_prompts:
        return ""
    captions = captions or [""]
    caption = captions[torch.randint(len(captions), (), generator=visit.generator("caption"))]
    if config.shuffle_caption:
        caption = _shuffled(caption, config.keep_tokens, visit.generator("caption/tags"))
    return prefixed(caption, config)


def prefixed(caption: str, config: DataConfig) -> str:
    """The caption with what comes before all that are not empty."""
    return f"{config.caption_prefix} {caption}" if config.caption_prefix and caption else caption


def _shuffled(caption: str, kept: int, generator: torch.Generator) -> str:
    """The tags that commas divide, all but the first ``kept`` in a new order."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    movable = tags[kept:]
    order = torch.randperm(len(movable), generator=generator).tolist()
    return ", ".join(tags[:kept] + [movable[i] for i in order])
