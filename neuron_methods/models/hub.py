"""The Hub: asked once whether it answers, its files and snapshots; or its cache on this machine, where it does not."""

from __future__ import annotations

import functools
import glob
import logging
import os
import threading

from neuron_methods.models.companions import companions
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line

LOG = logging.getLogger(__name__)

_OF_WEIGHTS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
_PATIENCE = 6.0  # seconds for one answer, names of machines resolved included


def hub_answers() -> bool:
    """Find out whether the Hub can be asked; where it cannot, its client goes by its cache from then on.

    huggingface_hub 2.4 tries every request again for half a minute where there is no network. So one request is made
    once, in good time, and without an answer the client is told what ``HF_HUB_OFFLINE=1`` would tell it.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    if _probe():
        return True
    constants.HF_HUB_OFFLINE = True
    LOG.warning("%s does not answer; taking what its cache on this machine holds", constants.ENDPOINT)
    return False


@functools.cache
def _probe() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=_PATIENCE).status_code)
        except Exception:  # whatever the network, a proxy or a certificate is in the way of
            LOG.debug("asking %s", constants.ENDPOINT, exc_info=True)

    # In a thread, as nothing bounds how long a name is looked up.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return bool(answers)


@functools.cache
def hub_file(repository: str, name: str, revision: str | None, cache_dir: str | None) -> str | None:
    """Get one file of a repository into the hub's cache; None where it is not to be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    hub_answers()
    try:
        return hf_hub_download(repository, name, revision=revision, cache_dir=cache_dir)
    except (HfHubHTTPError, OSError, ValueError):
        # No such file or repository, no network, or not a repository's name at all. Whoever loads a model meets the
        # same obstacle next and names it.
        return None


def hub_refusal(repository: str, revision: str | None = None) -> str | None:
    """Ask the Hub for a repository; why it is not to be had, None if it is."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository, revision=revision)
    except Exception as error:  # no such name, no access, and what its client's client says of a network that is gone
        return first_line(error)
    return None


def snapshot(repository: str, revision: str | None = None, cache_dir: str | None = None, *, code: bool = False) -> str:
    """Get a model's config, weights and companions into the Hub's cache.

    Args:
        repository: of the Hub.
        revision: of it.
        cache_dir: the Hub's cache, None for the default.
        code: whether custom code is wanted.

    Returns:
        The directory; where the Hub does not answer, what there is of it.

    Raises:
        UserError: it is not to be had.
    """
    from huggingface_hub import HfApi, snapshot_download

    if not hub_answers():
        config = hub_file(repository, "config.json", revision, cache_dir)
        if config is None:
            raise UserError(f"model {repository}: not in the Hub's cache on this machine, and the Hub cannot be asked")
        return os.path.dirname(config)
    try:
        files = HfApi().list_repo_files(repository, revision=revision)
        weights = ".safetensors" if any(name.endswith(".safetensors") for name in files) else ".bin"
        wanted = {*companions(files, code=code)}
        wanted |= {name for name in files if name.endswith(weights) or name in _OF_WEIGHTS}
        patterns = sorted(map(glob.escape, wanted))
        return snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
    except Exception as error:  # see `hub_refusal`
        raise UserError(f"model {repository}: not to be had from the Hub: {first_line(error)}") from None
