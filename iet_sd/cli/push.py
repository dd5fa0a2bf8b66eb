"""``python -m iet_sd push``, and what training does of it: the result of a run to the Hub."""

import sys
from collections.abc import Sequence
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
    repository = push.open_repository(settings.hub, folder)
    print(push.push(folder, repository, "Result of training with iet_sd"))


def _as_trained(values: dict[str, Any]) -> dict[str, Any]:
    """Name and privacy by the settings of the run; what else it saved has a name of its own.

    Else ``DIR/best`` would take the place of DIR on the Hub, or of the best of another run.
    """
    folder = Path(values["folder"]).expanduser().resolve()
    inner = folder.name in BESIDE and (folder.parent / SETTINGS).is_file()
    run = folder.parent if inner else folder
    if not (run / SETTINGS).is_file():
        return {}
    trained = read_yaml(run / SETTINGS, Config, "settings of the result")
    name = trained.get("hub_model_id") or run.name
    return {
        "hub_model_id": f"{name}-{folder.name}" if inner else name,
        "hub_private": trained.get("hub_private", False),
    }


def hide_from_trackers(token: str | None) -> None:
    """Take the token out of the arguments, which some trackers keep with a run."""
    if token:
        sys.argv[:] = [argument.replace(token, "***") for argument in sys.argv]


def open_repository(config: Config, process_index: int, num_processes: int) -> "Repository | None":
    """Where the result of a run is to be pushed, on the main process; before weights are loaded.

    None if nowhere. All processes take part. Errors: `UserError`, also for what the Hub refuses.
    """
    if not config.push.push_to_hub or config.training.dry_run:
        return None
    from iet_sd.engine.collectives import from_main
    from iet_sd.hub import push

    output_dir = Path(config.training.output_dir)
    opened = []  # kept from the answer to other processes, since it has the token

    def open_it() -> None:
        try:
            opened.append(push.open_repository(config.hub, output_dir))
        except PushFailed as error:
            hub = config.hub
            later = push.push_arguments(output_dir, hub.hub_model_id, hub.hub_private)
            raise UserError(
                f"--push_to_hub: {error} Or train without it, and push later by "
                f"{push.in_shell(later)}"
            ) from error

    from_main(open_it, process_index, num_processes)
    return opened[0] if opened else None


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
