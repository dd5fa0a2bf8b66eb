"""Settings of the Hub: which repository, and when a result is pushed there."""

from dataclasses import dataclass, field

from iet_sd.config.checks import positive
from iet_sd.errors import UserError

SECRETS = frozenset({"hub_token"})
"""Settings that are written nowhere."""


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """The repository on the Hub."""

    hub_model_id: str | None = None
    """Repository, as name or user/name. Default: the name of the folder, under your user; for push,
    that of the run."""
    hub_private: bool = False
    """Make the repository private; refuse one that is public already. Default for push: as the run
    was told."""
    hub_token: str | None = field(default=None, repr=False)
    """Token with write access. Better not given here, as launchers repeat the command line of a run
    that fails. Default: that of HF_TOKEN or `hf auth login`."""


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """What a training run pushes to the Hub."""

    push_to_hub: bool = False
    """Push the result to the Hub at the end: weights, card, settings, metrics, pictures."""
    hub_push_rounds: int | None = None
    """Push the average of the proxies too after every so many rounds, in the background."""

    def __post_init__(self) -> None:
        positive(self, "hub_push_rounds")
        if self.hub_push_rounds and not self.push_to_hub:
            raise UserError("--hub_push_rounds needs --push_to_hub.")


@dataclass(frozen=True, kw_only=True)
class ResultConfig:
    """The result of a training run."""

    folder: str
    """Folder with a pipeline or a LoRA, such as --output_dir of training."""
