"""The loop: rounds of proxies trained on shards, as a generator of events.

The loop trains; whoever iterates it decides what to log, draw and save. Shards are dealt out to
processes (shard k to process k mod P) and take turns on a process. Collectives happen only at the
end of a round, so processes may take different numbers of steps within one.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import Parameter

from iet_sd.config import Config
from iet_sd.data.dataset import Loader, TrainingImages
from iet_sd.data.shards import batches
from iet_sd.engine import collectives
from iet_sd.engine.objective import Objective
from iet_sd.engine.proxy import EMA, MOMENTS, WEIGHTS, Proxy, copy_into, live_weights, part
from iet_sd.engine.state import Event, Progress, RoundDone, ShardDone, State, StepDone
from iet_sd.engine.step import Counts, OnNonfinite, accumulate_gradient
from iet_sd.engine.store import Store, Tensors
from iet_sd.engine.update import update
from iet_sd.engine.usage import peak_memory
from iet_sd.errors import UserError
from iet_sd.method.aggregate import (
    AdapterMean,
    MomentMean,
    StreamingMean,
    outer_step,
    shard_weights,
)
from iet_sd.method.msr import redistribute
from iet_sd.seeding import seed_for

# Of what becomes of a shard: its own process tells, main or not.
logger = logging.getLogger("iet_sd.shards")
# A shard whose every batch is skipped makes no updates: its round ends after this many times the
# batches that the round should take.
MAX_STEPS_PER_UPDATE = 10


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

    @cached_property
    def loader(self) -> Loader:
        """Makes the batches of all shards; its workers live from the first one to the last."""
        workers = self.config.training.dataloader_num_workers
        return Loader(self.dataset, workers, pin_memory=self.device.type == "cuda")

    def start(self, shard_of_N: Tensor, store: Store | None = None) -> State:
        """The state before the first round; proxies wait in ``store``, by default in memory."""
        method, training = self.config.method, self.config.training
        scale = training.samples_per_update if training.scale_lr else 1
        text_encoder_lr = training.text_encoder_lr or training.learning_rate
        store = {} if store is None else store
        proxies = {
            shard: Proxy(
                shard,
                store,
                self.parameters,
                training,
                training.learning_rate * scale,
                text_encoder_lr * scale,
                self.steps_per_round * method.num_rounds,
                method.bank_bins,
                self.device,
            )
            for shard in range(self.process_index, method.num_shards, self.num_processes)
        }
        weights = live_weights(self.parameters)
        skips_N = torch.zeros_like(shard_of_N)
        ema = dict(weights) if training.use_ema else {}
        return State(0, weights, {}, {}, shard_of_N, skips_N, proxies, ema=ema)

    def run(self, state: State) -> Iterator[Event]:
        """Train from ``state`` to the last round; the live model then has the final weights."""
        with closing(self.loader):
            while state.round < self.config.method.num_rounds:
                yield from self.run_round(state)
        copy_into(self.parameters, state.weights)

    def run_round(self, state: State) -> Iterator[Event]:
        """One round of every proxy, then the boundary. All processes take part.

        Goes on where ``state.progress`` is, which is current at every `StepDone` and `ShardDone`.
        """
        method, round = self.config.method, state.round + 1
        progress = state.progress = state.progress or self.no_progress(state)
        finished = {event.shard for event in progress.done}
        for shard in [k for k in state.proxies if k not in finished]:
            yield from self.train_shard(state, shard)

        # All processes from here to the end of the round: sums over processes.
        began = time.perf_counter()
        gap = self._aggregate(state, progress.means)
        collectives.sum_in_place({"skips": progress.new_skips_N}, self.num_processes)
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
        trained = sum(event.seconds for event in progress.done)
        seconds = trained + time.perf_counter() - began
        done = RoundDone(round, shards, bool(progress.means), moved_K, gap, seconds)
        state.history.append(done)
        yield done

    def no_progress(self, state: State) -> Progress:
        """The progress at the beginning of a round."""
        return Progress(self._means(state), torch.zeros_like(state.skips_N))

    def train_shard(self, state: State, shard: int) -> Iterator[StepDone | ShardDone]:
        """One round of one proxy on its shard; at its `ShardDone` the proxy is still live."""
        training, method, progress = self.config.training, self.config.method, state.progress
        if progress.shard is None:
            progress.shard, progress.counts, progress.seconds = shard, Counts(), 0.0
        total, round = progress.counts, state.round + 1
        proxy, began = state.proxies[shard], time.perf_counter() - progress.seconds
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        proxy.enter(state.weights, state.moments, state.ema)
        members = (state.shard_of_N == shard).nonzero().flatten().tolist()
        loaded = self.loader.batches(
            batches(
                self.seed,
                round,
                shard,
                self.dataset.source.repeated(members),
                training.train_batch_size,
                self.dataset.source.sizes,
                start=total.batches,
            )
        )
        may_leave_out = method.agc or training.on_nonfinite == "skip_batch"
        may_leave_out |= training.mixed_precision == "fp16"  # whose loss scale is found by trying
        limit = self.steps_per_round * (MAX_STEPS_PER_UPDATE if may_leave_out else 1)
        while self.steps_done(total) < self.steps_per_round and total.steps < limit:
            # The one use of a global generator is dropout inside the model.
            torch.manual_seed(seed_for(self.seed, "dropout", round, shard, total.steps))
            step = total.steps + 1
            on_nonfinite = partial(self._on_nonfinite, f"{round}, shard {shard}, step {step}")
            # It is, unless it comes to no update; then so may be the next.
            is_last = step == limit or self.steps_done(total) + 1 == self.steps_per_round
            counts = self._step(proxy, loaded, progress.new_skips_N, on_nonfinite, is_last, total)
            total += counts
            progress.seconds = time.perf_counter() - began
            loss = counts.loss_sum / counts.scored if counts.scored else math.nan
            yield StepDone(round, shard, self.steps_done(total), loss, proxy.learning_rate)
        loaded.close()
        peak, seconds = peak_memory(self.device), time.perf_counter() - began
        done = ShardDone(round, shard, len(members), total, proxy.learning_rate, seconds, peak)
        yield done
        self.take_in(state, done, proxy.leave())

    def take_in(self, state: State, done: ShardDone, tensors: Tensors) -> None:
        """Count a shard as done: what its proxy holds joins the means, or waits for the next round.

        Also when the round goes on from what was saved at the shard's end.
        """
        progress, proxy = state.progress, state.proxies[done.shard]
        for prefix, mean in progress.means.items():
            mean.add(done.shard, part(tensors, prefix))
        if progress.means:
            kept = MOMENTS if self.config.method.proxy_optimizer == "keep" else ()
            tensors = {name: t for name, t in tensors.items() if name.startswith(kept)}
        proxy.keep(tensors)
        progress.done.append(done)
        progress.shard = None

    def steps_done(self, counts: Counts) -> int:
        """How much of ``steps_per_round`` is done."""
        return counts.updates if self.config.method.step_unit == "update" else counts.steps

    def _step(
        self,
        proxy: Proxy,
        loaded: Iterator[dict[str, Tensor]],
        new_skips_N: Tensor,
        on_nonfinite: OnNonfinite,
        is_last: bool,
        so_far: Counts,
    ) -> Counts:
        """Score ``gradient_accumulation_steps`` batches and do one update, if any is due.

        In the round's last step nothing is left waiting. ``so_far``: of the shard, in this round.
        """
        method, per_update = self.config.method, self.config.training.samples_per_update
        counts, trained, unread = Counts(), [], []
        for ahead in reversed(range(self.config.training.gradient_accumulation_steps)):
            done = accumulate_gradient(
                self.objective,
                next(loaded),
                proxy.memory,
                method,
                self.dataset,
                lambda loss: proxy.backward(loss / per_update),
                on_nonfinite,
                self.config.training.train_batch_size,
                loaded if method.refill_skipped else (),
                may_wait=ahead > 0 or not is_last,
                so_far=so_far,
            )
            counts += done.counts
            trained += done.trained
            unread += done.unread
            new_skips_N.index_add_(0, done.skipped, torch.ones_like(done.skipped))
        counts.steps = 1
        if trained:
            # The mean over what is trained, of all batches of the update together.
            update(proxy, counts, trained, unread, per_update / len(trained), on_nonfinite)
        elif method.empty_batch == "step" and not counts.nonfinite:
            proxy.update_with_zero_gradient()
            counts.updates = 1
        return counts

    def _on_nonfinite(self, where: str, what: str, samples: list[tuple[int, int]]) -> None:
        """Name a loss or gradient that is not finite; returns if what it is of is left out."""
        names = ", ".join(f"{self.dataset.source.sample_ids[i]} (t={t})" for i, t in samples)
        found = f"The {what} is not finite in round {where}, samples {names}."
        if self.config.training.on_nonfinite == "stop":
            raise UserError(
                f"{found} Look at these images, lower --learning_rate, or train without "
                "--mixed_precision fp16. Checkpoints written before are whole: "
                "--resume_from_checkpoint latest --on_nonfinite skip_batch goes on from there and "
                "leaves such batches out."
            )
        logger.warning("%s They are left out.", found)

    def _means(self, state: State) -> dict[str, StreamingMean]:
        """Means of what the end of the round under way averages, with nothing in them yet."""
        method, training, round = self.config.method, self.config.training, state.round + 1
        if round % method.aggregate_every and round != method.num_rounds:
            return {}
        sizes = [int((state.shard_of_N == shard).sum()) for shard in range(method.num_shards)]
        share_K = shard_weights(sizes, method.aggregation_weights)
        refactor = self.config.model.lora_aggregation == "product"
        means = {WEIGHTS: AdapterMean(share_K, self.lora_pairs, refactor)}
        if method.proxy_optimizer == "average":
            means[MOMENTS] = MomentMean(share_K, (training.adam_beta1, training.adam_beta2))
        if state.ema and refactor:
            means[EMA] = AdapterMean(share_K, self.lora_pairs, refactor)
        elif state.ema:
            means[EMA] = StreamingMean(share_K)
        return means

    def _aggregate(self, state: State, means: dict[str, StreamingMean]) -> float | None:
        """Average over processes, and step from the last average; returns the largest LoRA gap.

        All processes take part.
        """
        method = self.config.method
        for mean in means.values():
            collectives.sum_in_place(mean.totals, self.num_processes)
        if WEIGHTS not in means:
            return None
        gaps = means[WEIGHTS].gaps()
        average = means[WEIGHTS].result()
        outer_step(
            state.weights,
            average,
            state.velocity,
            method.outer_learning_rate,
            method.outer_momentum,
        )
        state.weights = average
        if MOMENTS in means:
            state.moments = means[MOMENTS].result()
        if EMA in means:
            state.ema = means[EMA].result()
        return max(gaps.values(), default=None)
