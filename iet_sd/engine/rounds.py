"""The loop: rounds of proxies trained on shards, as a generator of events.

The loop trains; whoever iterates it decides what to log, draw and save. Shards are dealt out to
processes (shard k to process k mod P) and take turns on a process. Collectives happen only at the
end of a round, so processes may take different numbers of steps within one.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from iet_sd.config import Config
from iet_sd.data.dataset import TrainingImages, loader
from iet_sd.data.shards import visits
from iet_sd.engine import collectives
from iet_sd.engine.proxy import Proxy, Weights, copy_into, live_weights
from iet_sd.engine.step import Counts, Objective, accumulate_gradient
from iet_sd.method.aggregate import StreamingMean, StreamingProduct, shard_weights
from iet_sd.method.msr import redistribute
from iet_sd.seeding import seed_for

# A shard whose every batch is skipped makes no updates: its round ends after this many times the
# batches that the round should take.
MAX_STEPS_PER_UPDATE = 10


@dataclass(frozen=True)
class StepDone:
    """A proxy has done one step."""

    round: int
    shard: int
    progress: int
    """Of ``steps_per_round``, in the unit of ``step_unit``."""
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


Event = StepDone | ShardDone | RoundDone


@dataclass
class Progress:
    """What this process has done of the round under way."""

    mean: StreamingMean | StreamingProduct
    """Of the proxies that are done, if the round ends with an average."""
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
    weights: Weights
    """Trainable weights after the last aggregation, on the CPU."""
    shard_of_N: Tensor
    """int64: the shard of each sample, -1 for none."""
    skips_N: Tensor
    """int64: skips of each sample since the last redistribution, up to the last round's end."""
    proxies: dict[int, Proxy] = field(default_factory=dict)
    """The proxies of this process, by shard."""
    progress: Progress | None = None
    """None between rounds."""


@dataclass(frozen=True)
class Trainer:
    """What training reads: settings, data, and the live model."""

    config: Config
    seed: int
    steps_per_round: int
    objective: Objective
    dataset: TrainingImages
    parameters: dict[str, Parameter]
    lora_pairs: Sequence[tuple[str, str]]
    device: torch.device
    process_index: int = 0
    num_processes: int = 1

    def start(self, shard_of_N: Tensor) -> State:
        """The state before the first round."""
        method, training = self.config.method, self.config.training
        rate = training.learning_rate
        if training.scale_lr:
            rate *= training.samples_per_update
        proxies = {
            shard: Proxy(
                self.parameters,
                training,
                rate,
                self.steps_per_round * method.num_rounds,
                method.bank_bins,
                self.device,
            )
            for shard in range(self.process_index, method.num_shards, self.num_processes)
        }
        weights = live_weights(self.parameters)
        return State(0, weights, shard_of_N, torch.zeros_like(shard_of_N), proxies)

    def run(self, state: State) -> Iterator[Event]:
        """Train from ``state`` to the last round; the live model then has the final weights."""
        while state.round < self.config.method.num_rounds:
            yield from self.run_round(state)
        copy_into(self.parameters, state.weights)

    def run_round(self, state: State) -> Iterator[Event]:
        """One round of every proxy, then the boundary. All processes take part.

        Goes on where ``state.progress`` is, which is current at every `StepDone`.
        """
        method, began = self.config.method, time.perf_counter()
        round = state.round + 1
        aggregates = round % method.aggregate_every == 0 or round == method.num_rounds
        sizes = [int((state.shard_of_N == shard).sum()) for shard in range(method.num_shards)]
        share_K = shard_weights(sizes, method.aggregation_weights)
        progress = state.progress = state.progress or self.no_progress(state)
        finished = {event.shard for event in progress.done}
        for shard in [k for k in state.proxies if k not in finished]:
            yield from self.train_shard(state, shard, share_K[shard] if aggregates else None)

        # All processes from here to the end of the round: sums over processes.
        gap = None
        if aggregates:
            state.weights, gap = self._aggregate(progress.mean)
        collectives.sum_in_place([progress.new_skips_N], self.num_processes)
        state.skips_N += progress.new_skips_N
        shards = collectives.gather(progress.done, self.num_processes)
        moved_K = [0] * method.num_shards
        if method.msr and (round - 1) % method.msr_every == 0 and round < method.num_rounds:
            state.shard_of_N, moved = redistribute(
                state.shard_of_N,
                state.skips_N,
                method.num_shards,
                method.msr_fraction,
                method.msr_min_skips,
                method.msr_ties,
                seed_for(self.seed, "redistribute", round),
            )
            state.skips_N.zero_()
            moved_K = moved.tolist()
        state.round, state.progress = round, None
        copy_into(self.parameters, state.weights)
        shards.sort(key=lambda event: event.shard)
        seconds = time.perf_counter() - began
        yield RoundDone(round, shards, aggregates, moved_K, gap, seconds)

    def no_progress(self, state: State) -> Progress:
        """The progress at the beginning of a round."""
        mean = StreamingProduct(self.lora_pairs) if self.lora_pairs else StreamingMean()
        return Progress(mean, torch.zeros_like(state.skips_N))

    def train_shard(
        self, state: State, shard: int, share: float | None
    ) -> Iterator[StepDone | ShardDone]:
        """One round of one proxy on its shard; its weights join the mean with ``share``, if any."""
        training, method, progress = self.config.training, self.config.method, state.progress
        if progress.shard is None:
            progress.shard, progress.counts, progress.seconds = shard, Counts(), 0.0
        total, round = progress.counts, state.round + 1
        proxy, began = state.proxies[shard], time.perf_counter() - progress.seconds
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        proxy.enter(state.weights)
        members = (state.shard_of_N == shard).nonzero().flatten().tolist()
        batches = loader(
            self.dataset,
            visits(
                self.seed, round, shard, members, start=total.steps * training.samples_per_update
            ),
            training.train_batch_size,
            training.dataloader_num_workers,
            pin_memory=self.device.type == "cuda",
        )
        limit = self.steps_per_round * (MAX_STEPS_PER_UPDATE if method.agc else 1)
        while self.progress(total) < self.steps_per_round and total.steps < limit:
            # The one use of a global generator is dropout inside the model.
            torch.manual_seed(seed_for(self.seed, "dropout", round, shard, total.steps))
            counts = self._step(proxy, batches, progress.new_skips_N)
            total += counts
            progress.seconds = time.perf_counter() - began
            loss = counts.loss_sum / counts.scored
            yield StepDone(round, shard, self.progress(total), loss, proxy.learning_rate)
        batches.close()
        weights = proxy.leave()
        if share is not None:
            progress.mean.add(weights, share)
            proxy.weights = None
        progress.shard = None
        peak = collectives.peak_memory(self.device)
        seconds = time.perf_counter() - began
        done = ShardDone(round, shard, len(members), total, proxy.learning_rate, seconds, peak)
        progress.done.append(done)
        yield done

    def progress(self, counts: Counts) -> int:
        """How much of ``steps_per_round`` is done."""
        return counts.updates if self.config.method.step_unit == "update" else counts.steps

    def _step(
        self, proxy: Proxy, batches: Iterator[dict[str, Tensor]], new_skips_N: Tensor
    ) -> Counts:
        """Score ``gradient_accumulation_steps`` batches and do one update, if any is due."""
        method, per_update = self.config.method, self.config.training.samples_per_update
        counts = Counts()
        for _ in range(self.config.training.gradient_accumulation_steps):
            part, skipped = accumulate_gradient(
                self.objective,
                next(batches),
                proxy.memory,
                method,
                self.dataset,
                lambda loss: proxy.backward(loss / per_update),
            )
            counts += part
            new_skips_N.index_add_(0, skipped, torch.ones_like(skipped))
        counts.steps = 1
        if counts.trained:
            # The mean over what is trained, of all batches of the update together.
            counts.updates = int(proxy.update(per_update / counts.trained))
        elif method.empty_batch == "step" and not method.taa:
            proxy.update_with_zero_gradient()
            counts.updates = 1
        return counts

    def _aggregate(self, mean: StreamingMean | StreamingProduct) -> tuple[Weights, float | None]:
        """The averaged weights, summed over processes. All processes take part."""
        for total in mean.totals():
            collectives.sum_in_place(total.values(), self.num_processes)
        if isinstance(mean, StreamingMean):
            return mean.result(), None
        if self.config.model.lora_aggregation == "product":
            weights, gaps = mean.result()
        else:
            weights, gaps = mean.totals()[0], mean.gaps()
        return weights, max(gaps.values())
