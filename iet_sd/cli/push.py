"""``python -m iet_sd push``, and what training does of it: the result of a run to the Hub."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iet_sd.arguments import load, read_yaml
from iet_sd.cli.common import status_of
from iet_sd.config import Config, PushSettings
from iet_sd.engine.stopping import Signals
from iet_sd.errors import PushFailed, UserError
from iet_sd.hub.contents import BESIDE, SETTINGS, contents

if TYPE_CHECKING:
    from iet_sd.hub.push import Repository


def push(argv: Sequence[str]) -> int:
    """Run ``python -m iet_sd push``; returns the exit status."""
    return status_of(lambda: _push(argv), "")


def _push(argv: Sequence[str]) -> None:
    settings = load(argv, PushSettings, "python -m iet_sd push", below=_as_trained)
    from iet_sd.hub import push

    folder = Path(settings.result.folder).expanduser()
    contents(folder, "")  # before anything is made on the Hub
    repository = push.check_repository(settings.hub, folder)
    push.make_repository(repository)
    print(push.push(folder, repository, "Result of training with iet_sd"))


def _as_trained(values: dict[str, Any]) -> dict[str, Any]:
    """Name and privacy by the settings of the run; what else it saved has a name of its own.

    Else ``DIR/best`` would take the place of DIR on the Hub, or of the best of another run.
    """
    run, suffix = Path(values["folder"]).expanduser().resolve(), ""
    while run.name in BESIDE and (run.parent / SETTINGS).is_file():  # best has its own merged
        run, suffix = run.parent, f"-{run.name}{suffix}"
    if not (run / SETTINGS).is_file():
        return {}
    trained = read_yaml(run / SETTINGS, Config, "settings of the result")
    return {
        "hub_model_id": f"{trained.get('hub_model_id') or run.name}{suffix}",
        "hub_private": trained.get("hub_private", False),
    }


def hide_from_trackers(token: str | None) -> None:
    """Take the token out of the arguments, which some trackers keep with a run."""
    if token:
        sys.argv[:] = [argument.replace(token, "***") for argument in sys.argv]


def check_repository(config: Config, process_index: int, num_processes: int) -> "Repository | None":
    """Where the result of a run is to be pushed, on the main process; before weights are loaded.

    None if nowhere. All processes take part. Errors: `UserError`, also for what the Hub refuses.
    """
    if not config.push.push_to_hub or config.training.dry_run:
        return None
    from iet_sd.engine.collectives import from_main
    from iet_sd.hub import push

    output_dir = Path(config.training.output_dir)
    checked = []  # kept from the answer to other processes, since it has the token

    def check() -> None:
        with _before_training(config):
            checked.append(push.check_repository(config.hub, output_dir))

    from_main(check, process_index, num_processes)
    return checked[0] if checked else None


def make_repository(
    config: Config, repository: "Repository | None", process_index: int, num_processes: int
) -> None:
    """Make it, when all else is ready, so that a mistake leaves no empty repository behind.

    ``repository`` and errors: as `check_repository`.
    """
    if not config.push.push_to_hub:
        return
    from iet_sd.engine.collectives import from_main
    from iet_sd.hub import push

    def make() -> None:
        with _before_training(config):
            push.make_repository(repository)

    from_main(make, process_index, num_processes)


@contextmanager
def _before_training(config: Config) -> Iterator[None]:
    """What the Hub refuses, as a `UserError` that says how to train without it."""
    try:
        yield
    except PushFailed as error:
        from iet_sd.hub import push

        hub = config.hub
        later = push.push_arguments(config.training.output_dir, hub.hub_model_id, hub.hub_private)
        raise UserError(
            f"--push_to_hub: {error} Or train without it, and push later by {push.in_shell(later)}"
        ) from error


def push_result(output_dir: Path, repository: "Repository", signals: Signals) -> None:
    """Push what training has saved. Errors: `PushFailed`, saying how to do it later."""
    from iet_sd.hub import push

    later = push.in_shell(repository.arguments(output_dir))
    kept = f"The result is whole, in {output_dir}; push it by {later}"
    signals.release(kept)
    try:
        print(push.push(output_dir, repository, "Result of training with iet_sd"))
    except (PushFailed, UserError) as error:  # of the Hub, or of a text beside the weights
        raise PushFailed(f"{error} {kept}") from error
