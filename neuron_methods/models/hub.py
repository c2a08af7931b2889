"""The Hub: asked once whether it answers, its files and snapshots; or its cache on this machine, where it does not."""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
import threading
import time

from neuron_methods.models.companions import companions
from neuron_methods.models.hub_session import asked, bound_session, without_token
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, listed

LOG = logging.getLogger(__name__)

_OF_MODELS = ("config.json", "adapter_config.json")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_PATIENCE = 6.0  # seconds for one answer, names of machines resolved included


def hub_answers() -> bool:
    """Find out whether the Hub can be asked; where it cannot, its client goes by its cache from then on.

    huggingface_hub 2.4 tries every request again for half a minute where there is no network. So one request is made
    once, in good time, and without an answer the client is told what ``HF_HUB_OFFLINE=1`` would tell it.
    """
    from huggingface_hub import constants

    bound_session()
    if constants.is_offline_mode():
        return False
    if _probe(constants.ENDPOINT):
        return True
    constants.HF_HUB_OFFLINE = True
    LOG.warning("%s does not answer; taking what its cache on this machine holds", constants.ENDPOINT)
    return False


@functools.cache
def _probe(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(endpoint, timeout=_PATIENCE).status_code)
        except Exception:  # whatever the network, a proxy or a certificate is in the way of
            LOG.debug("asking %s", endpoint, exc_info=True)

    # In a thread, as nothing bounds how long a name is looked up.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return bool(answers)


@functools.cache
def hub_file(repository: str, name: str, revision: str | None, cache_dir: str | None) -> str | None:
    """Get one file of a repository into the hub's cache; None where it is not to be had.

    Raises:
        UserError: the Hub was given up, or the file came damaged.
    """
    from huggingface_hub import hf_hub_download

    hub_answers()
    started = time.time()
    try:
        found = hf_hub_download(repository, name, revision=revision, cache_dir=cache_dir)
    except UserError as error:
        raise UserError(f"model {repository}: {error}") from error
    except Exception:
        # No such file or repository, no network, or not a repository's name at all. Whoever loads a model meets the
        # same obstacle next and names it.
        LOG.debug("getting %s of %s", name, repository, exc_info=True)
        return None
    _check_new(repository, [found], started)
    return found


def hub_refusal(repository: str, revision: str | None = None) -> str | None:
    """Ask the Hub for a repository; why it is not to be had, None if it is."""
    from huggingface_hub import HfApi

    bound_session()
    try:
        HfApi().model_info(repository, revision=revision)
    except Exception as error:  # no such name, no access, and what its client's client says of a network that is gone
        return without_token(first_line(error))
    return None


def snapshot(
    repository: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    *,
    code: bool = False,
    weights: bool = True,
) -> str:
    """Get a model's config, weights and companions into the Hub's cache.

    Args:
        repository: of the Hub.
        revision: of it.
        cache_dir: the Hub's cache, None for the default.
        code: whether custom code is wanted.
        weights: whether weights are.

    Returns:
        The directory; where the Hub does not answer, what there is of it.

    Raises:
        UserError: it is not to be had.
    """
    from huggingface_hub import HfApi

    if not hub_answers():
        config = hub_file(repository, "config.json", revision, cache_dir)
        if config is None:
            raise UserError(f"model {repository}: not in the Hub's cache on this machine, and the Hub cannot be asked")
        return os.path.dirname(config)
    what = f"model {repository}"
    files = asked(what, lambda: HfApi().list_repo_files(repository, revision=revision))
    wanted = {*companions(files, code=code), *(name for name in files if name in _OF_MODELS)}
    if weights:
        kind = ".safetensors" if any(name.endswith(".safetensors") for name in files) else ".bin"
        wanted |= {name for name in files if name.endswith(kind) or name in _INDICES}
    return download(repository, revision, cache_dir, sorted(map(glob.escape, wanted)))


def download(repository: str, revision: str | None, cache_dir: str | None, patterns: list[str] | None = None) -> str:
    """Get files of a repository into the Hub's cache, and make sure that they are what the Hub calls them.

    Args:
        repository: of the Hub.
        revision: of it.
        cache_dir: the Hub's cache, None for the default.
        patterns: globs of the files that are wanted; None: all.

    Returns:
        The directory.

    Raises:
        UserError: they are not to be had, or came damaged; the cache holds nothing of those that did.
    """
    from huggingface_hub import snapshot_download

    started = time.time()
    asking = functools.partial(snapshot_download, repository, revision=revision, cache_dir=cache_dir)
    place = asked(f"model {repository}", lambda: asking(allow_patterns=patterns))
    _check_new(repository, [os.path.join(folder, n) for folder, _, names in os.walk(place) for n in names], started)
    return place


def local_copy(path: str, revision: str | None = None, *, weights: bool = True) -> str:
    """Find the directory of a model: itself, or its copy in the Hub's cache; errors as in `snapshot`."""
    return path if os.path.isdir(path) else snapshot(path, revision, weights=weights)


def _check_new(repository: str, files: list[str], started: float) -> None:
    """Hold files that have just come to the hash by which the Hub's cache calls them.

    huggingface_hub 2.4 compares lengths alone, and what is in its cache it never looks at again.
    """
    damaged = []
    for file in files:
        if not os.path.islink(file):
            continue
        blob = os.path.join(os.path.dirname(file), os.readlink(file))
        kind = {40: "sha1", 64: "sha256"}.get(len(name := os.path.basename(blob)))
        # A blob that is a link itself came by Xet, which checks what it brings.
        if kind is None or os.path.islink(blob) or os.path.getmtime(blob) < started - 1:
            continue
        made = hashlib.new(kind, usedforsecurity=False)
        if kind == "sha1":  # git's
            made.update(b"blob %d\0" % os.path.getsize(blob))
        with open(blob, "rb") as content:
            while part := content.read(1 << 20):
                made.update(part)
        if made.hexdigest() != name.lower():
            os.unlink(file)
            os.unlink(blob)
            damaged.append(os.path.basename(file))
    if damaged:
        raise UserError(
            f"model {repository}: came damaged from the Hub, by their hash, and were removed from the cache: "
            f"{listed(damaged)}; start again, and if it stays so, tell the repository's owner"
        )
