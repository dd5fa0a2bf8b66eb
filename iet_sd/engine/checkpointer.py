"""When checkpoints are written, read and deleted: by the settings, and when told to stop."""

import logging
import shutil
from pathlib import Path
from typing import Any

from iet_sd.config import TrainingConfig
from iet_sd.engine import checkpoint
from iet_sd.engine.checkpoint import Checkpoint
from iet_sd.engine.collectives import wait
from iet_sd.engine.rounds import Event, ShardDone, State, StepDone, Trainer
from iet_sd.engine.stopping import Signals
from iet_sd.errors import Stopped, UserError

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves after rounds, by all processes together, and within them, by each for itself."""

    def __init__(
        self,
        config: TrainingConfig,
        trainer: Trainer,
        state: State,
        identity: dict[str, Any],
        signals: Signals,
    ) -> None:
        """``identity`` as in `checkpoint.save`; ``signals`` say when to stop."""
        self.config = config
        self.trainer = trainer
        self.state = state
        self.identity = identity
        self.signals = signals
        self.output_dir = Path(config.output_dir)
        self.last_shard = [*state.proxies][-1]
        """Of this process, in every round."""
        self.process = f"{trainer.process_index}-of-{trainer.num_processes}"
        self.base: Path | None = None
        """The newest checkpoint of a round's end, after round ``base_round``."""
        self.base_round = -1
        self.steps = 0
        """Steps of this process since then."""
        self.steps_of_rounds = 0
        """Steps of the rounds done since then, by a process on average: the same on all."""

    def load(self, found: Checkpoint | None) -> None:
        """Put the state back to the end of the round of ``found``. Nothing is written."""
        if found:
            checkpoint.load(found, self.state, self.identity)

    def begin(self, found: Checkpoint | None) -> None:
        """Begin, or go on, after `load` of the same. All processes take part."""
        saves = self.config.checkpointing_rounds > 0
        if checkpoint.goes_on_here(found, self.output_dir):
            if saves:
                self.base, self.base_round = found.folder, found.round
            if self.trainer.process_index == 0:
                # What came after it is done again, and must not pass for newer.
                checkpoint.remove_after(self.output_dir, found.round)
        elif saves:
            self._save_round()
            within = found and found.folder / f"process-{self.process}"
            if within and within.is_dir():
                shutil.copytree(within, self.base / within.name)
        if found:
            checkpoint.load_within_round(found.folder, self.trainer, self.state, self.process)
            where = ", within the next" if self.state.progress else ""
            logger.info("going on after round %d%s, from %s", found.round, where, found.folder)
        self._hold_while_training()

    def after(self, event: Event) -> None:
        """Save if it is time to. Errors: `Stopped`, after saving, if a signal has come."""
        if isinstance(event, StepDone):
            self.steps += 1
            due = self.steps % self.config.checkpointing_steps == 0
            if due or self.signals.number:
                self._save_within_round(event.shard)
            if self.signals.number:
                raise Stopped(self.signals.number, self._kept())
        elif isinstance(event, ShardDone):
            self._save_within_round(event.shard, event)
            if event.shard == self.last_shard:
                # It waits for other processes now, and would lose nothing.
                self.signals.release(self._kept())
        else:
            steps = sum(shard.counts.steps for shard in event.shards)
            self.steps_of_rounds += steps // self.trainer.num_processes
            if self._stays(event.round) or self._long_ago():
                self._save_held()
            self._hold_while_training()

    def _hold_while_training(self) -> None:
        """Hold, unless nothing is left to save. Errors: `Stopped` if a signal has come.

        A process that goes on may have done its shards already.
        """
        self.signals.release(self._kept())
        done = [event.shard for event in self.state.progress.done] if self.state.progress else []
        is_over = self.state.round == self.trainer.config.method.num_rounds
        if not is_over and self.last_shard not in done:
            self.signals.hold()

    def _save_held(self) -> None:
        """Save the round, which no signal breaks off. Errors: `Stopped` if one has come.

        The main process may draw and measure for long before it saves: who waits ends at once.
        """
        wait(self.trainer.num_processes)
        self.signals.hold()
        kept = None
        try:
            self._save_round()
            kept = self._kept()
        except UserError:
            # Another process has ended: told to, if this one is.
            if self.signals.number is None:
                raise
        self.signals.release(kept)

    def _stays(self, round: int) -> bool:
        """Whether the checkpoint of a round is one that was asked for."""
        every = self.config.checkpointing_rounds
        last = self.trainer.config.method.num_rounds
        return every > 0 and (round == last or (round > 0 and round % every == 0))

    def _long_ago(self) -> bool:
        """Whether a round between must be saved too: there is no saving within the next else."""
        every = self.config.checkpointing_rounds
        return every > 0 and self.steps_of_rounds >= self.config.checkpointing_steps

    def _kept(self) -> str:
        """What is saved of the run so far, at a moment when it can be saved, for `Stopped`."""
        if self.base is None:
            return "No checkpoint was written, as --checkpointing_rounds 0 says."
        saved = self.base_round == self.state.round
        what = "What was done is saved" if saved else "Steps since the last checkpoint are lost"
        return f"{what}: go on with --resume_from_checkpoint latest."

    def _save_within_round(self, shard: int, done: ShardDone | None = None) -> None:
        if self.base_round == self.state.round:
            checkpoint.save_within_round(self.base, self.state, shard, self.process, done)

    def _save_round(self) -> None:
        """Write a checkpoint, and delete what it makes needless."""
        before, round_before = self.base, self.base_round
        index, number = self.trainer.process_index, self.trainer.num_processes
        self.base = checkpoint.save(self.output_dir, self.state, self.identity, index, number)
        self.base_round, self.steps, self.steps_of_rounds = self.state.round, 0, 0
        if index:
            return
        if before and self._stays(round_before):
            checkpoint.remove_within_round(before)
        elif before:
            shutil.rmtree(before)
        if self.config.checkpoints_total_limit:
            checkpoint.remove_beyond(self.output_dir, self.config.checkpoints_total_limit)
