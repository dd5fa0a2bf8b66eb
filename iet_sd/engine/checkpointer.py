"""When checkpoints are written and read: by the settings, and when the run is told to stop."""

import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iet_sd.config import TrainingConfig
from iet_sd.engine import checkpoint
from iet_sd.engine.rounds import Event, RoundDone, State, StepDone, Trainer
from iet_sd.errors import Stopped

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves after rounds, by all processes together, and within them, by each for itself."""

    def __init__(
        self,
        config: TrainingConfig,
        trainer: Trainer,
        state: State,
        identity: dict[str, Any],
        barrier: Callable[[], None],
    ) -> None:
        """``identity`` as in `checkpoint.save`."""
        self.config = config
        self.trainer = trainer
        self.state = state
        self.identity = identity
        self.barrier = barrier
        self.output_dir = Path(config.output_dir)
        self.process = f"{trainer.process_index}-of-{trainer.num_processes}"
        self.steps = 0
        self.base: Path | None = None
        """The checkpoint of the last round's end, if there is one."""
        self.stop_signal: int | None = None

    def start(self) -> None:
        """Load what ``--resume_from_checkpoint`` names, or begin anew. All processes take part."""
        folder = checkpoint.find(self.output_dir, self.config.resume_from_checkpoint)
        if folder is None:
            if self.trainer.process_index == 0:
                checkpoint.remove_after(self.output_dir, round=-1)
            self.barrier()
            if self.config.checkpointing_rounds:
                self._save_round()
            return
        checkpoint.load(folder, self.state, self.identity)
        if folder.resolve().parent == self.output_dir.resolve():
            self.base = folder
            # What came after it is done again, and must not pass for newer.
            if self.trainer.process_index == 0:
                checkpoint.remove_after(self.output_dir, self.state.round)
            self.barrier()
        else:
            self._begin_here(folder)
        fresh = self.trainer.no_progress(self.state)
        self.state.progress = checkpoint.load_within_round(folder, self.state, self.process, fresh)
        within = ", within the next" if self.state.progress else ""
        logger.info("going on after round %d%s, from %s", self.state.round, within, folder)

    def after(self, event: Event) -> None:
        """Save if it is time to. Errors: `Stopped`, after saving, if a signal has come."""
        if isinstance(event, RoundDone):
            every = self.config.checkpointing_rounds
            self.base, self.steps = None, 0
            if every and (
                event.round % every == 0 or event.round == self.trainer.config.method.num_rounds
            ):
                self._save_round()
        elif isinstance(event, StepDone):
            self.steps += 1
            due = self.steps % self.config.checkpointing_steps == 0
            if self.base and (due or self.stop_signal):
                checkpoint.save_within_round(self.base, self.state, self.process)
            if self.stop_signal:
                raise Stopped(self.stop_signal, saved=self.base is not None)

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Let SIGTERM and Ctrl-C end the step under way first; a second Ctrl-C ends at once."""

        def note(number: int, _: Any) -> None:
            self.stop_signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _begin_here(self, folder: Path) -> None:
        """Begin this run's own records with those of the run that made ``folder``."""
        lines = folder.parent / "metrics.jsonl"
        if self.trainer.process_index == 0 and lines.exists():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(lines, self.output_dir / lines.name)
        self._save_round()

    def _save_round(self) -> None:
        self.base = checkpoint.save(
            self.output_dir,
            self.state,
            self.identity,
            self.config.checkpoints_total_limit,
            self.trainer.process_index,
            self.barrier,
        )
