"""Upload a merge to the Hub, through huggingface_hub.

`HfApi.upload_folder` does it: it takes a revision, a commit message and pull requests, and goes on where an earlier
upload broke off, as the Hub tells which large files it has (huggingface_hub 2.4 has no other function for large
folders). What is said about an error never quotes a request, which carries the token.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, validate_repo_id

from neuron_methods.models.hub_session import HubGaveUp, bound_session, sent, without_token
from neuron_methods.sharing.hub_copy import check_base, files_to_upload, unloadable_base, upload_copy
from neuron_methods.sharing.verification import verify_directory
from neuron_methods.support.errors import UserError, explained_by
from neuron_methods.support.runs import claimed
from neuron_methods.support.text import format_bytes, listed, one_line, shortened

# The class that errors of the connection share, whichever HTTP library this huggingface_hub is built on.
_CONNECTION_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_WRITERS = {"write", "admin", "contributor"}


@dataclass(frozen=True)
class PushOptions:
    """How to upload.

    Attributes:
        private: make a new repository private; None: as the account's settings have it.
        revision: branch to commit to; made if it is not there.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing.
        base_model: id of an adapter's base on the Hub.
        include: globs of files that are uploaded beside those that make the model.
    """

    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    create_pr: bool = False
    base_model: str | None = None
    include: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pushed:
    """Where an upload has gone, the address of repository or pull request, and what the user should know."""

    url: str
    notes: list[str]


@explained_by("upload")
def check_access(repository: str, options: PushOptions = PushOptions()) -> None:
    """Make sure, before anything takes long, that the token may write to `repository`.

    Raises:
        UserError: not a repository's id, no token, a wrong one, one that may not write there, or no network.
    """
    try:
        validate_repo_id(repository)
        namespace, name = repository.split("/")
    except (HFValidationError, ValueError):
        raise UserError(f"{repository}: no id of a repository; give USER/NAME or ORGANISATION/NAME") from None
    if options.create_pr and options.revision not in (None, "main"):
        raise UserError("--create-pr opens a pull request against main; leave --revision out")
    with _explained(repository, "the token cannot be checked"):
        user = HfApi().whoami()
        try:
            _check_rights(user, namespace, name, options)
        except (AttributeError, TypeError):
            raise UserError(f"{repository}: {shortened(user)} is no answer of a Hub; check HF_ENDPOINT") from None


def push_directory(
    place: Path, repository: str, options: PushOptions = PushOptions(), *, progress: bool = True
) -> Pushed:
    """Verify a model, an adapter or a routed model and upload it; run again after an interruption it goes on.

    Raises:
        UserError: another run writes to the directory, it is not complete, the token may not write, or the upload did
            not finish.
    """
    with _unchanging(place):
        return _push(place, repository, options, progress)


@contextmanager
def _unchanging(place: Path) -> Iterator[None]:
    """Let no run of this package write to a directory meanwhile; where none may write, none has to be kept away."""
    beside = place.resolve().parent
    with claimed(place.resolve(), place) if os.access(beside, os.W_OK) else nullcontext():
        yield


@explained_by("upload")
def _push(place: Path, repository: str, options: PushOptions, progress: bool) -> Pushed:
    kind = verify_directory(place).kind
    check_base(place, options.base_model)
    files, left = files_to_upload(place, options.include)
    check_access(repository, options)
    api = HfApi()
    message = options.commit_message or f"Upload {'merge' if kind == 'model' else kind} with mergekit-neuron"
    notes = [note] if (note := unloadable_base(place, options.base_model)) else []
    if left:
        notes.append(f"left here, as no part of the {kind}: {listed(left)}; --include PATTERN uploads more")
    with _explained(repository, "the upload did not finish"), _progress(progress, f"Uploading {place} to {repository}"):
        if not options.create_pr or not api.repo_exists(repository):
            api.create_repo(repository, private=options.private, exist_ok=True)
        if options.private and not api.model_info(repository).private:
            raise UserError(f"{repository}: exists and is public, --private does not change that; change it on the Hub")
        if options.revision not in (None, "main") and not options.revision.startswith("refs/"):
            api.create_branch(repository, branch=options.revision, exist_ok=True)
        with upload_copy(place, files, repository, options.base_model) as copy:
            done = api.upload_folder(
                repo_id=repository,
                folder_path=copy,
                revision=options.revision,
                commit_message=message,
                create_pr=options.create_pr,
            )
    url = done.pr_url if options.create_pr and done.pr_url else f"{api.endpoint}/{repository}"
    if options.revision not in (None, "main") and not options.create_pr:
        url += f"/tree/{options.revision}"
    return Pushed(url, notes)


def _check_rights(user: dict[str, Any], namespace: str, name: str, options: PushOptions) -> None:
    token = (user.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    who = user.get("name", "?")
    if role == "read":
        raise UserError(f"the token of {who} may only read; make one that may write (huggingface.co/settings/tokens)")
    organisations = {entry.get("name"): entry for entry in user.get("orgs") or ()}
    if namespace != who and namespace not in organisations and not options.create_pr:
        raise UserError(
            f"{namespace}/{name}: the token is that of {who}, who is no member of {namespace}; push to {who}/{name}, "
            "or offer a pull request with --create-pr"
        )
    in_organisation = organisations.get(namespace, {}).get("roleInOrg")
    if in_organisation is not None and in_organisation not in _WRITERS and not options.create_pr:
        raise UserError(f"{namespace}/{name}: {who} may only read in {namespace} (role {in_organisation})")
    if role == "fineGrained":
        _check_scopes(token.get("fineGrained") or {}, namespace, name, options)


def _check_scopes(scopes: dict[str, Any], namespace: str, name: str, options: PushOptions) -> None:
    needed = {"repo.write", *(["discussion.write"] if options.create_pr else [])}
    for scope in scopes.get("scoped") or ():
        entity = scope.get("entity") or {}
        covers = entity.get("name") in (namespace, f"{namespace}/{name}")
        if covers and needed.intersection(scope.get("permissions") or ()):
            return
    if needed.intersection(scopes.get("global") or ()):
        return
    raise UserError(
        f"{namespace}/{name}: the token is fine-grained and may not write there; give it write access to repositories "
        f"of {namespace} (huggingface.co/settings/tokens)"
    )


@contextmanager
def _progress(shown: bool, what: str) -> Iterator[None]:
    """Let huggingface_hub draw its bars on a terminal, where it would in a log, too; a log gets one line."""
    if shown and sys.stderr.isatty():
        yield
        return
    if shown:
        print(what, file=sys.stderr)
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(repository: str, what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do, without the request."""
    bound_session()
    before = sent()
    try:
        yield
    except UserError as error:
        if not isinstance(error, HubGaveUp):
            raise
        raise UserError(f"{repository}: {what}: {error}; {_again(before)}") from error
    except LocalTokenNotFoundError:
        raise UserError(
            "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN (huggingface.co/settings/tokens)"
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(f"{repository}: {what}: HF_HUB_OFFLINE is set; unset it to push") from None
    except Exception as error:
        cause: BaseException = error
        # The client wraps what happens to a single file.
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        again = _again(before)
        if isinstance(cause, HubGaveUp):
            problem = f"{cause}; {again}"
        elif isinstance(cause, HfHubHTTPError):
            problem = _of_the_server(cause, again)
        elif isinstance(cause, (_CONNECTION_ERROR, ConnectionError, TimeoutError)):
            problem = f"no connection to the Hub ({type(cause).__name__}); {again}"
        elif isinstance(cause, ValueError) and not isinstance(cause, JSONDecodeError):  # a card that the Hub refuses
            problem = without_token(one_line(cause))
        else:
            said = without_token(one_line(cause))
            problem = f"the Hub's answer is none of a Hub ({type(cause).__name__}: {said}); check HF_ENDPOINT; {again}"
        raise UserError(f"{repository}: {what}: {problem}") from error


def _again(before: int) -> str:
    arrived = f" ({format_bytes(sent() - before)} have arrived)" if sent() > before else ""
    return f"your files are unchanged, push again and it goes on where it was{arrived}"


def _of_the_server(error: HfHubHTTPError, again: str) -> str:
    status = error.response.status_code if error.response is not None else 0
    said = without_token(" ".join((error.server_message or "").split()))
    said = f" ({shortened(said, 300, quote=False)})" if said else ""
    if status == 401:
        return "the token is not valid; log in again with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write there{said}"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or the token may not see it"
    return f"the Hub answered {status}{said}; {again}"
