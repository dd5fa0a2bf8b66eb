"""What all cells of a study have in common, and where files lie."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Protocol:
    """Model, data, length of training, and what is measured; stored with every result."""

    model: str = "demo/model"
    """A pipeline folder, from the root of the repository."""
    resolution: int = 64
    images: int = 256
    """Training images, each of a near-duplicate group of its own."""
    heldout: int = 192
    """Held-out images, likewise."""
    duplicated: int = 13
    """Images that the setting ``duplicated`` shows `copies` times: 5 %."""
    copies: int = 10
    batch_size: int = 16
    updates: int = 1024
    """Of all proxies together."""
    rounds: int = 16
    aggregate_every: int = 2
    """Rounds between averages of the proxies, and between readings."""
    warmup: int = 10
    """Updates of a proxy over which the learning rate rises; then it is constant, so that a
    reading within a run is what a shorter run would have given."""
    prompts: int = 128
    """Captions of training images that are drawn, one image each."""
    samples: int = 128
    """Training images (those of the prompts) and held-out images whose loss is taken."""
    timesteps: int = 6
    """At which it is taken."""
    inference_steps: int = 12
    guidance_scale: float = 2.0
    shown: int = 8
    """Prompts whose pictures are kept with the result."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def fingerprint(self) -> str:
        """Results of one fingerprint can be compared."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
