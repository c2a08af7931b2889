"""What a merge stands on, looked at: versions, the hook in mergekit, devices, memory, disk, the Hub and its token."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from neuron_methods import __version__
from neuron_methods._autoload import failures
from neuron_methods.models.hub import hub_answers
from neuron_methods.models.hub_session import without_token
from neuron_methods.plugin.patches import register
from neuron_methods.support.errors import UserError
from neuron_methods.support.memory import free_memory
from neuron_methods.support.text import first_line, format_bytes

GOOD, NOTE, BAD = "ok", "note", "wrong"
PACKAGE = "mergekit-neuron"
_PTH = "mergekit_neuron_autoload.pth"
_EXTRAS = ("report", "vision", "tune", "metrics", "lm-eval", "ui", "demo")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, whether it is `GOOD`, a `NOTE` or `BAD`, and what was found."""

    name: str
    state: str
    found: str


def examine(ask_hub: bool = True) -> Iterator[Finding]:
    """Look at everything; `ask_hub`: whether the Hub is asked, too, for an answer and whose the token is."""
    looks: list[Callable[[], Iterator[Finding]]] = [_packages, _hook, _devices, _room]
    looks.append(_hub if ask_hub else _hub_unasked)
    for look in looks:
        try:
            yield from look()
        except Exception as error:  # what is looked for is what may be broken
            what = without_token(f"{type(error).__name__}: {first_line(error)}")
            yield Finding(look.__name__.strip("_"), BAD, what)


def _packages() -> Iterator[Finding]:
    yield Finding("mergekit-neuron", GOOD, f"{__version__}, Python {platform.python_version()}, {platform.system()}")
    missing: list[str] = []
    for text in metadata.requires(PACKAGE) or ():
        requirement = Requirement(text)
        extra = next((e for e in _EXTRAS if _is_of(requirement, e)), None)
        if extra is None and requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if extra is None:
                yield Finding(
                    requirement.name, BAD, f"not installed; pip install '{requirement.name}{requirement.specifier}'"
                )
            else:
                missing.append(extra)
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding(requirement.name, BAD, f"{found}, and {wanted} is needed: pip install '{wanted}'")
        elif extra is None:
            yield Finding(requirement.name, GOOD, found)
    if missing:
        wanted = ",".join(dict.fromkeys(missing))
        yield Finding("extras", NOTE, f"without {wanted}: pip install '{PACKAGE}[{wanted}]'")


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _hook() -> Iterator[Finding]:
    there = [place for place in (sysconfig.get_path("purelib"), *sys.path) if place and (Path(place) / _PTH).is_file()]
    if os.environ.get("MERGEKIT_NEURON_AUTOLOAD") == "0":
        yield Finding(
            "hook", NOTE, "switched off by MERGEKIT_NEURON_AUTOLOAD=0: mergekit-yaml does not know our methods"
        )
    elif there:
        yield Finding("hook", GOOD, f"{_PTH} is in {there[0]}: mergekit's own commands know our methods")
    else:
        yield Finding("hook", BAD, f"{_PTH} is nowhere on the path: install the package with pip again")
    register()
    from mergekit.merge_methods import registry

    problems = failures()
    known = [method.spec.name for method in registry.registered_methods()]
    if problems:
        yield Finding("mergekit", BAD, "; ".join(first_line(error) for _, error in problems))
    else:
        yield Finding("methods", GOOD, f"{len(known)} known to mergekit")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("processor", GOOD, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        yield Finding(f"cuda:{number}", GOOD, f"{about.name}, {format_bytes(about.total_memory)}")
    if torch.backends.mps.is_available():
        yield Finding("mps", GOOD, "Apple's GPU")
    elif not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield Finding("accelerator", NOTE, "none" + (f", though torch is built for {built}" if built else ""))


def _room() -> Iterator[Finding]:
    from huggingface_hub import constants

    free = free_memory()
    yield Finding("memory", GOOD, "unknown" if free is None else f"{format_bytes(free)} free")
    for name, place in (("disk here", Path.cwd()), ("Hub's cache", Path(constants.HF_HUB_CACHE))):
        held = next(parent for parent in (place, *place.parents) if parent.is_dir())
        may = os.access(held, os.W_OK)
        found = f"{place}: {format_bytes(shutil.disk_usage(held).free)} free{'' if may else ', not to be written to'}"
        yield Finding(name, GOOD if may else BAD, found)


def _hub_unasked() -> Iterator[Finding]:
    yield Finding("Hub", NOTE, "not asked")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        yield Finding("Hub", NOTE, "offline by HF_HUB_OFFLINE: what its cache holds is taken")
        return
    if not hub_answers():
        yield Finding("Hub", NOTE, f"{constants.ENDPOINT} does not answer: what its cache holds is taken")
        return
    yield Finding("Hub", GOOD, f"{constants.ENDPOINT} answers")
    if get_token() is None:
        yield Finding("token", NOTE, "none: public models alone, and no push; hf auth login, or HF_TOKEN")
        return
    try:
        user = HfApi().whoami()
    except UserError:
        raise
    except Exception as error:
        yield Finding("token", BAD, f"the Hub does not take it ({without_token(first_line(error))}); hf auth login")
        return
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    writes = {"write": "may write", "read": "may read", "fineGrained": "may do what its scopes say"}
    yield Finding("token", GOOD, f"of {user.get('name')}, {writes.get(str(role), f'of the role {role}')}")
