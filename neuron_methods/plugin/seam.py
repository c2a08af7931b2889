"""The seam between mergekit and this package: every private name of mergekit 0.1.5 that we read or replace.

mergekit has no plug-in discovery, and hands a method one tensor at a time without ever showing it the plan of a merge.
`SEAM` lists what we hold on to instead, under the module of mergekit whose import brings it; the rest of the package
reaches all of it through this module, and `patches` puts our functions in their places. `check_fit` says what is not as
we build on it: a release that renamed something must not go unnoticed, as without the seam ViT and T5 are cut again.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

from neuron_methods.support.errors import UserError

_MARK = "_neuron_methods_patched"


class Private(NamedTuple):
    """A name in a module of mergekit that is nobody's promise, and arguments it is called with, by mergekit or us."""

    module: str
    name: str
    takes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.name}" + (f"({', '.join(self.takes)})" if self.takes else "")

    def find(self) -> tuple[Any, str, Any]:
        """Give what holds it, its last name, and what it is; None for an attribute that only instances have.

        Raises:
            AttributeError: it is not there.
            ImportError: nor is its module.
        """
        *holders, last = self.name.split(".")
        holder: Any = import_module(self.module)
        for part in holders:
            holder = getattr(holder, part)
        if last in vars(holder):
            return holder, last, getattr(holder, last)
        if inspect.isclass(holder) and last in inspect.get_annotations(holder):
            return holder, last, None
        raise AttributeError(f"{holder} has no {last} of its own")

    def fits(self) -> bool:
        """Tell whether it is there, and takes the arguments it is called with."""
        try:
            found = self.find()[2]
            return not self.takes or {*self.takes} <= inspect.signature(found).parameters.keys()
        except (AttributeError, ImportError, TypeError, ValueError):
            return False


_METHODS, _TASKS, _PLAN, _MERGE = "mergekit.merge_methods", "mergekit.io.tasks", "mergekit.plan", "mergekit.merge"
_RAW = "mergekit.scripts.merge_raw_pytorch"
_GROUPS = ("groups", "parameters", "options", "input_dtypes", "out_dtype")

PLAN = Private(_PLAN, "MergePlanner._plan")
TENSORS = Private(_PLAN, "MergePlanner._tensors")
METHOD = Private(_PLAN, "MergePlanner._method")
TOKENIZER_TASK = Private(_PLAN, "MergePlanner._tokenizer_task")
GET_LOADER = Private(_TASKS, "LoaderCache.get", ("model",))
LAZY_LOADER = Private("mergekit.common", "ModelReference.lazy_loader", ("cache_dir", "lazy_unpickle"))
CONFIG = Private("mergekit.common", "ModelReference.config", ("trust_remote_code",))
LOCAL_PATH = Private("mergekit.common", "ModelReference.local_path", ("cache_dir", "ignore_lora"))
SERIALIZE = Private("mergekit.common", "ModelReference.serialize")
RESOLVE_NAME = Private(_TASKS, "LoadTensor._resolve_name", ("loader",))
DTYPE_FROM_NAME = Private(_TASKS, "dtype_from_name", ("name",))
REFERENCED_MODELS = Private("mergekit.config", "MergeConfiguration.referenced_models")
DONOR = Private(_MERGE, "_get_donor_model", ("merge_config", "options"))
COPY_TOKENIZER = Private(_MERGE, "_copy_tokenizer", ("merge_config", "out_path", "options"))
ARCHITECTURE_INFO = Private("mergekit.architecture", "get_architecture_info", ("config", "options"))
ARCHITECTURE_OF_MERGE = Private(_MERGE, "get_architecture_info", ("config", "options"))
IS_HF = Private("mergekit.card", "is_hf", ("path",))
TQDM = Private("mergekit.tokenizer.build", "tqdm")
BUILD_TOKENIZER = Private(
    "mergekit.tokenizer.build",
    "build_tokenizer",
    ("base_model", "referenced_models", "tokenizer_source", "trust_remote_code", "add_tokens"),
)
FLAT_MERGE = Private(_RAW, "plan_flat_merge", ("config", "options"))
FLAT_PARAMETERS = Private(_RAW, "construct_param_dicts", ("config", "merge_method", "tensor_name"))

#: {module of mergekit that the start-up hook waits for: what must be there once it is imported}.
SEAM: dict[str, tuple[Private, ...]] = {
    _METHODS: (
        # Overridden by `methods.contract`, called by `adapters.combine`, which are below this room.
        Private("mergekit.merge_methods.base", "MergeMethod._execute", _GROUPS),
        Private("mergekit.merge_methods.base", "MergeMethod._bind_parameters", ("groups", "parameters")),
    ),
    "mergekit.architecture": (ARCHITECTURE_INFO,),
    _TASKS: (
        GET_LOADER,
        Private(_TASKS, "LoaderCache.loaders"),
        Private(_TASKS, "LoaderCache.hf_cache_dir"),
        RESOLVE_NAME,
        DTYPE_FROM_NAME,
        LAZY_LOADER,
        CONFIG,
        LOCAL_PATH,
    ),
    "mergekit.config": (REFERENCED_MODELS, SERIALIZE),
    _PLAN: (PLAN, TENSORS, METHOD, TOKENIZER_TASK),
    _MERGE: (ARCHITECTURE_OF_MERGE, DONOR, COPY_TOKENIZER, IS_HF, TQDM, BUILD_TOKENIZER),
    _RAW: (FLAT_MERGE, FLAT_PARAMETERS),
}


def check_fit(modules: Iterable[str]) -> None:
    """Make sure that the private names that come with these modules of mergekit are what we build on.

    Raises:
        UserError: naming mergekit's version and the names.
    """
    wrong = [str(private) for module in modules for private in SEAM[module] if not private.fits()]
    if wrong:
        raise UserError(
            f"mergekit {version('mergekit')} is not one that mergekit-neuron fits: {', '.join(wrong)} is gone or has "
            "changed; use a release of mergekit that it was made for (0.1.5), or a newer mergekit-neuron"
        )


def replace(private: Private, around: Callable[[Any], Any]) -> None:
    """Put what `around` makes of a function into its place, once."""
    holder, name, original = private.find()
    if not hasattr(original, _MARK):
        replacement = functools.wraps(original)(around(original))
        setattr(replacement, _MARK, True)
        setattr(holder, name, replacement)


def write_references_as_text() -> None:
    """Let a model be written as it is read, whatever its path holds.

    For a path with a space or a quote mergekit 0.1.5's serializer gives the model itself back, which pydantic calls a
    circular reference: at the very end of mergekit-yaml, where the card is written. pydantic has compiled the function
    into every class with a model in it, so it is its code that is exchanged.
    """

    def serialize(self: Any) -> Any:
        if self.override_architecture is not None:
            return {"model": self.model, "lora": self.lora, "override_architecture": self.override_architecture}
        return str(self)

    SERIALIZE.find()[2].__code__ = serialize.__code__


@contextmanager
def quiet_mergekit() -> Iterator[None]:
    """Keep two things of mergekit 0.1.5 off the terminal that no user can do anything about.

    It sets `torch_dtype` on the output's config, which transformers 5 calls deprecated at every run; and its bar over
    tokenizer permutations shows even where `quiet` is set.
    """

    def passes(record: logging.LogRecord) -> bool:
        return "`torch_dtype` is deprecated" not in record.getMessage()

    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(passes)
    try:
        with _in_place_of(TQDM, SimpleNamespace(tqdm=lambda iterable, **_: iterable)):
            yield
    finally:
        log.removeFilter(passes)


@contextmanager
def any_dtype_name() -> Iterator[None]:
    """Let mergekit 0.1.5 save buffers of bool and short integers: its table of dtypes ends at int64."""
    import torch

    original = DTYPE_FROM_NAME.find()[2]
    with _in_place_of(DTYPE_FROM_NAME, lambda name: getattr(torch, name or "", None) or original(name)):
        yield


@contextmanager
def _in_place_of(private: Private, replacement: Any) -> Iterator[None]:
    holder, name, original = private.find()
    setattr(holder, name, replacement)
    try:
        yield
    finally:
        setattr(holder, name, original)


def planned_tasks(planner: Any) -> list[tuple[Any, Any]]:
    """Read a planner's (weight, task) per output tensor, in the order of writing.

    mergekit 0.1.5 defines some tensors twice (the merger's biases of Qwen2.5-VL); each is planned once.
    """
    return list({weight.name: (weight, task) for weight, task in planner._tensors}.values())


def replan(planner: Any, tasks: Iterable[tuple[Any, Any]]) -> None:
    """Let a planner write these (weight, task) and no others."""
    planner._tensors = list(tasks)


def method_of(planner: Any) -> Any:
    """Read a planner's merge method."""
    return planner._method


def use_method(planner: Any, method: Any) -> None:
    """Let a planner plan for this merge method."""
    planner._method = method


def tokenizer_task(planner: Any) -> Any:
    """Read the task that builds the output's tokenizer; None where the YAML asks for none."""
    return planner._tokenizer_task


def stored_name(load: Any, loader: Any) -> str | None:
    """Find the name under which a model stores what a `LoadTensor` asks for; None: converted, or missing."""
    return load._resolve_name(loader)


def copy_tokenizer(configuration: Any, place: str, options: Any) -> None:
    """Copy the tokenizer of a configuration's donor to a directory, with the configuration's chat template."""
    COPY_TOKENIZER.find()[2](configuration, place, options)


def architecture_info(configuration: Any, options: Any) -> Any:
    """Choose the definition of an architecture that a configuration is planned by."""
    return ARCHITECTURE_INFO.find()[2](configuration, options)


def models_in_order(configuration: Any) -> Iterator[Any]:
    """List the models of a configuration as they stand in it, the base first.

    mergekit 0.1.5 takes them from a set, whose order changes from run to run. Where there is no base_model, the first
    one gives the output its config and tokenizer.
    """
    if configuration.base_model is not None:
        yield configuration.base_model
    for holder in (configuration, *(configuration.modules or {}).values()):
        yield from (entry.model for entry in holder.models or ())
        yield from (source.model for output in holder.slices or () for source in output.sources)
