"""What training changes, and the events it tells of."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from iet_sd.engine.proxy import Proxy
from iet_sd.engine.step import Counts
from iet_sd.engine.store import Tensors
from iet_sd.method.aggregate import StreamingMean


@dataclass(frozen=True)
class StepDone:
    """A proxy has done one step."""

    round: int
    shard: int
    step: int
    """Steps done of ``steps_per_round``, in the unit of ``step_unit``."""
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class ShardDone:
    """A proxy has done its round."""

    round: int
    shard: int
    size: int
    counts: Counts
    learning_rate: float
    seconds: float
    peak_memory: int
    """Bytes: allocated on the GPU in this round, or resident in this process so far."""


@dataclass(frozen=True)
class RoundDone:
    """All proxies have done their round, on all processes; known to every process."""

    round: int
    shards: list[ShardDone]
    aggregated: bool
    moved_K: list[int]
    """Samples that left each shard."""
    lora_gap: float | None
    """Largest relative difference of mean(BA) from mean(B) mean(A) over the adapters."""
    seconds: float
    """Spent on this process's shards and the boundary."""


Event = StepDone | ShardDone | RoundDone


@dataclass
class Progress:
    """What this process has done of the round under way."""

    means: dict[str, StreamingMean]
    """Of the proxies that are done, by the prefix of the tensors that the round's end averages."""
    new_skips_N: Tensor
    """int64: skips in this round by this process's shards."""
    done: list[ShardDone] = field(default_factory=list)
    shard: int | None = None
    """The shard whose proxy is in the live parameters."""
    counts: Counts = field(default_factory=Counts)
    """Of that shard."""
    seconds: float = 0.0
    """Spent on that shard before training was last started."""


@dataclass
class State:
    """All that training changes, listed once; what is not here is derived."""

    round: int
    """Rounds done."""
    weights: Tensors
    """Trainable weights after the last aggregation, on the CPU."""
    moments: Tensors
    """The optimizer's moments after it, if they are averaged too."""
    velocity: Tensors
    """Momentum of the outer optimizer, if it has any."""
    shard_of_N: Tensor
    """int64: the shard of each sample, -1 for none."""
    skips_N: Tensor
    """int64: skips of each sample since the last redistribution, up to the last round's end."""
    proxies: dict[int, Proxy] = field(default_factory=dict)
    """The proxies of this process, by shard."""
    progress: Progress | None = None
    """None between rounds."""
    history: list[RoundDone] = field(default_factory=list)
    """Of all rounds done."""
    ema: Tensors = field(default_factory=dict)
    """The moving average of the weights after the last aggregation, if there is one."""
    probes: list[dict[str, Any]] = field(default_factory=list)
    """What was measured of the model after rounds, as JSON; on the main process. Training does not
    look at it."""
