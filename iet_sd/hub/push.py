"""Pushing a result: all that can fail is tried before training, and the result goes in one commit.

A commit is whole or not at all, so a push that breaks off leaves the repository as it was. It also
deletes what an earlier push put there and this result does not have: a LoRA beside the index of a
pipeline would load as the old pipeline, and an evaluation of other weights would speak for these.
"""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from iet_sd.config import HubConfig
from iet_sd.errors import PushFailed, UserError
from iet_sd.hub.contents import contents, may_be_ours

_MAY_NOT = "the token may not write there; it needs the role write, and you the right to the name"
_STATUS = {
    401: "the Hub does not accept the token; log in by `hf auth login`, or set HF_TOKEN",
    404: "there is no such repository, or the token may not see it",
    429: "the Hub has had too many requests from you",
}
_OF_RIGHTS = {**_STATUS, 403: _MAY_NOT}
"""Where rights are asked for; a 403 of a commit may be of storage or content, and the Hub says."""


@dataclass(frozen=True)
class Repository:
    """A repository that could be written to, or made, when that was checked."""

    repo_id: str
    private: bool
    token: str = field(repr=False)

    def arguments(self, folder: Path | str) -> list[str]:
        """Of Python, to push a result there by another process."""
        return push_arguments(folder, self.repo_id, self.private)


def push_arguments(folder: Path | str, name: str | None, private: bool) -> list[str]:
    """Of Python, to push a result by itself."""
    flags = [*(["--hub_model_id", name] if name else []), *["--hub_private"] * private]
    return ["-m", "iet_sd", "push", str(folder), *flags]


def in_shell(arguments: list[str]) -> str:
    """What people type to have Python do it."""
    return shlex.join(["python", *arguments])


def check_repository(config: HubConfig, folder: Path) -> Repository:
    """Find out whether a result may be pushed, as far as can be told without making anything.

    Its name is that of ``folder`` unless the settings say another.
    Errors: `UserError` for a bad name; `PushFailed` for what the Hub refuses, or is not there for.
    """
    name = config.hub_model_id or folder.expanduser().resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is no name for a repository on the Hub: {error} Give another by "
            "--hub_model_id, as name or user/name."
        ) from error
    with _told(name, config.hub_token, _OF_RIGHTS):
        token = (config.hub_token or get_token() or "").strip()
        if not token:
            raise LocalTokenNotFoundError
        if not (token.isascii() and token.isprintable()):
            raise UserError("The token for the Hub has characters that none has: copy it again.")
        api = HfApi(token=token)
        user = api.whoami()
        repo_id = name if "/" in name else f"{user['name']}/{name}"
        repository = Repository(repo_id, config.hub_private, token)
        try:
            _check_there(api, repository)
        except RepositoryNotFoundError:
            _check_may_make(repo_id, user)
    return repository


def make_repository(repository: Repository) -> None:
    """Make the repository if it isn't there yet. Errors: as `check_repository`."""
    with _told(repository.repo_id, repository.token, _OF_RIGHTS):
        api = HfApi(token=repository.token)
        api.create_repo(repository.repo_id, private=repository.private or None, exist_ok=True)
        _check_there(api, repository)


def _check_there(api: HfApi, repository: Repository) -> None:
    """Errors: `RepositoryNotFoundError`; else for one that we may not write, or all may read."""
    api.auth_check(repository.repo_id, write=True)
    if repository.private and not api.model_info(repository.repo_id).private:
        raise UserError(
            f"{repository.repo_id} is public, and --hub_private was given, here or to the run. "
            "Make it private on its page on the Hub, or give another --hub_model_id."
        )


def _check_may_make(repo_id: str, user: Mapping[str, Any]) -> None:
    """Whether the name can be ours, by what the Hub says of the ``user``; the rest it says later.

    Errors: `PushFailed`.
    """
    owner = repo_id.partition("/")[0].lower()
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs") or [])]
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read" or owner not in [name.lower() for name in owners]:
        raise PushFailed(f"{repo_id} on the Hub: {_MAY_NOT}.")


def push(folder: Path, repository: Repository, message: str) -> str:
    """Push the result in ``folder``, as `contents` says; what was pushed where, in words.

    Errors: `UserError` of `contents`; `PushFailed`, whatever goes wrong on the way.
    """
    files = contents(folder, repository.repo_id)
    with _told(repository.repo_id, repository.token, _STATUS):
        api = HfApi(token=repository.token)
        there = api.list_repo_files(repository.repo_id)
        stale = [name for name in there if may_be_ours(name) and name not in files]
        operations = [
            CommitOperationAdd(name, what if isinstance(what, bytes) else str(what))
            for name, what in files.items()
        ]
        operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
        api.create_commit(repository.repo_id, operations, commit_message=message)
    gone = f", and deleted {len(stale)} of an earlier push" if stale else ""
    return f"Pushed {len(files)} files to {api.endpoint}/{repository.repo_id}{gone}"


@contextmanager
def _told(name: str, token: str | None, meanings: Mapping[int, str]) -> Iterator[None]:
    """Whatever the Hub's client raises, as a `PushFailed` of one line, without the token.

    ``meanings``: of the Hub's statuses.
    """
    try:
        yield
    except (UserError, PushFailed):
        raise
    except Exception as error:  # it raises anything: also of its own, of the network's, of Rust's
        reason = _reason(error, meanings)
        if token:
            reason = reason.replace(token.strip(), "***")
        raise PushFailed(f"{name} on the Hub: {reason}.") from error


def _reason(error: BaseException, meanings: Mapping[int, str]) -> str:
    """What went wrong, and what to do about it where that is known."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _reason(error.__cause__, meanings)  # "Error while uploading", and why
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; log in by `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE says not to go online"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f" ({_line(error.server_message)})" if error.server_message else ""
        return meanings.get(status, f"the Hub answered with status {status}") + said
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"it cannot be reached ({type(error).__name__}: {_line(error)})"
    return f"{type(error).__name__}: {_line(error)}"


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300].rstrip(".")
