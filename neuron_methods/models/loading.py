"""A model's config, its processor and the model itself in memory, placed on the devices there are.

Nothing that a model brings along is run: transformers would ask on stdin where it is not told so.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from neuron_methods.models.devices import resolve_device
from neuron_methods.models.formats import quantised_with, refuse_other_formats
from neuron_methods.models.headers import header_entries, stored_count, stored_headers, weight_files
from neuron_methods.models.hub import local_copy
from neuron_methods.models.kinds import Processor
from neuron_methods.models.model_files import CONFIG_NAME, check_files, foreign_reading, read_model_config
from neuron_methods.models.processes import process_state
from neuron_methods.models.reference import Place
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.models.tokenizer_files import read_vocabulary
from neuron_methods.support.errors import UserError, explained_by
from neuron_methods.support.finite import check_finite
from neuron_methods.support.memory import check_memory, free_memory
from neuron_methods.support.text import first_line, listed, one_line

_MADE = 1 << 26  # numbers that a model makes as it is built, at most


@explained_by("models")
def read_config(place: Place, where: str) -> PretrainedConfig:
    """Read the config of a model.

    Args:
        place: of the model.
        where: how messages call it, as for all functions here: "model base", "routed.yaml: base_model".

    Raises:
        UserError: there is none to read.
    """
    refuse_other_formats(place.path, where)
    if os.path.isdir(place.path) and not os.path.lexists(os.path.join(place.path, CONFIG_NAME)):
        raise UserError(f"{where}: the directory holds no config.json; it is no model")
    try:
        directory = Path(local_copy(place.path, place.revision, weights=False))
    except UserError as error:
        found = "neither a directory here nor to be had from the hub"
        raise UserError(f"{where}: cannot read its config ({found}): {error}") from error
    check_files(directory, place.path)
    read_model_config(directory / CONFIG_NAME, stored_count(directory))
    with foreign_reading(f"{where}: cannot read its config"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def read_architecture(config: PretrainedConfig, where: str) -> str:
    """Name the class that the config names; raises UserError if transformers has no such class."""
    architecture = (config.architectures or [""])[0]
    if not hasattr(transformers, architecture or "-"):
        raise UserError(
            f"{where}: its config's first architecture, {architecture!r}, is no class of transformers "
            f"{transformers.__version__}"
        )
    return architecture


def refuse_oversized(model: Any, config: PretrainedConfig, directory: Path, where: str) -> None:
    """Make sure that a config asks for no more numbers than the files hold, before memory is taken for them.

    Raises:
        UserError: it does, or the class cannot be built from it.
    """
    entries = (entry for file in weight_files(directory) for entry in header_entries(file)[1].values())
    stored = sum(prod(entry.shape) for entry in entries)
    built = Skeleton.build(model, config).model
    asked = {id(t): t.numel() for t in (*built.parameters(), *built.buffers())}
    # Rotary tables and masks are made and not stored; what is tied counts once.
    if sum(asked.values()) > 2 * stored + _MADE:
        name, tensor = max((*built.named_parameters(), *built.named_buffers()), key=lambda pair: pair[1].numel())
        raise UserError(
            f"{where}: by its config.json it has {sum(asked.values())} numbers, of these {name} {list(tensor.shape)}, "
            f"and its files hold {stored}; the two are not of one model: download or save it again"
        )


@explained_by("models")
def load_weights(
    place: Place,
    where: str,
    *,
    dtype: str = "auto",
    architecture: str | None = None,
    held: Mapping[str, Tensor] | None = None,
    **placement: Any,
) -> PreTrainedModel:
    """Load a model by the class that its config names, in evaluation mode, all weights frozen.

    Args:
        place: of the model; an adapter is no model, see `adapters.live`.
        where: for messages.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        architecture: another class of transformers, of which only the body has to be stored: its head has any values.
        held: its tensors, by their names in files, where they are in memory and the directory has the rest; a model in
            the same dtype shares their memory.
        **placement: `device_map` and what goes with it, as transformers takes them.

    Raises:
        UserError: there is no such model, its architecture is unknown, its weights are not safetensors, or some of
            them are missing or of another shape than its config says.
    """
    config = read_config(place, where)
    named = read_architecture(config, where)
    headless = architecture not in (None, named)
    architecture = architecture or named
    with foreign_reading(f"{where}: cannot load it"):
        directory = local_copy(place.path, place.revision)
        if held is None:
            if quantised_with(config) is None:
                refuse_oversized(getattr(transformers, architecture), config, Path(directory), where)
            _check_fits(directory, where, dtype, placement)
        try:
            model, found = getattr(transformers, architecture).from_pretrained(
                directory if held is None else None,
                config=config,
                state_dict=held,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **placement,
            )
            if held is not None:
                _read_beside(model, directory)
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            if (how := quantised_with(config)) is not None:
                raise UserError(
                    f"{where}: its weights are quantised ({how}): {first_line(error)}; name the model that it was made "
                    "from, in bfloat16"
                ) from error
            raise
    missing = set(found["missing_keys"])
    if missing and headless:
        skeleton = Skeleton(model)
        missing = {path for path in missing if skeleton.in_body(path) is not None}
    if missing:  # transformers would go on with random numbers in their place
        by = "which the adapters' heads are of" if headless else "which its config names"
        raise UserError(f"{where}: its files lack weights of {architecture}, {by}: {listed(sorted(missing))}")
    check_finite(model.named_parameters(), where)  # buffers may be masks of -Inf
    _watch_tokens(model, where)
    return model.eval().requires_grad_(False)


def _read_beside(model: PreTrainedModel, directory: str) -> None:
    """Give a model that was made of tensors in memory what transformers reads beside a model's weights."""
    model.name_or_path = model.config.name_or_path = directory
    if model.can_generate():
        kept = {"cache_dir": None, "force_download": False, "proxies": None, "token": None, "revision": None}
        model.adjust_generation_fn(
            None, False, False, directory, **kept, local_files_only=True, subfolder="", trust_remote_code=False
        )


def _watch_tokens(model: PreTrainedModel, where: str) -> None:
    """Let a model refuse tokens that it has no embedding of, before torch fails on them or an accelerator is lost."""

    def before(embedding: torch.nn.Module, given: tuple[Any, ...]) -> None:
        count = int(embedding.num_embeddings)
        if given and given[0].numel() and (largest := int(given[0].max())) >= count:
            raise UserError(
                f"{where}: its tokenizer makes token {largest} of a text, and its embeddings hold {count} tokens; "
                "tokenizer and weights are not of one model: save the two together"
            )

    count = getattr(model.config.get_text_config(), "vocab_size", None)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == count:
            module.register_forward_pre_hook(before)


def bytes_in_memory(directory: Path, dtype: str = "auto") -> int:
    """Tell from the headers of a model's files what its weights take in memory, without reading them.

    Args:
        directory: of the model.
        dtype: they are loaded in, as for `load_weights`.

    Raises:
        UserError: a file is missing or damaged.
    """
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    return sum(
        header.entries * (sizes[dtype] if dtype in sizes and header.dtype.is_floating_point else header.dtype.itemsize)
        for header in stored_headers(directory).values()
    )


def _check_fits(directory: str, where: str, dtype: str, placement: Mapping[str, Any]) -> None:
    """Refuse a model that is larger than what is free.

    Where accelerate has been given bounds, it is wanted to offload to disk what does not fit.
    """
    if placement.get("max_memory"):
        return
    try:
        need = bytes_in_memory(Path(directory), dtype)
    except UserError:
        return  # of what is wrong with the files transformers says more, or reads them all the same
    device = placement.get("device_map")
    device = device.get("", "cpu") if isinstance(device, dict) else device or "cpu"
    if device == "auto":  # accelerators first, the CPU takes the rest
        device, count = "cpu", torch.cuda.device_count()
        need -= sum(free_memory(f"cuda:{index}") or 0 for index in range(count))
    advice = "a smaller dtype would halve it" if dtype == "float32" else "another machine or a smaller model would do"
    check_memory(need, f"{where}: loading it", advice, str(device))


@contextlib.contextmanager
def placed_weights(
    place: Place,
    where: str,
    dtype: str,
    max_memory: dict[Any, int | str] | None = None,
    device: str | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> Iterator[PreTrainedModel]:
    """Load a model as `load_weights` does and let accelerate place it, for as long as the block lasts.

    A process on its own spreads the model over what there is, and offloads to the CPU and to disk (into a directory
    that is removed afterwards) what does not fit. Under ``accelerate launch`` every process holds the whole model.

    Args:
        place: of the model.
        where: for messages.
        dtype: as for `load_weights`.
        max_memory: accelerate's bounds per device, by default what is free.
        device: as for `device_map`, which places it instead; None: as said above.
        held: as for `load_weights`.
    """
    state = process_state()
    if device is not None:
        yield load_weights(place, where, dtype=dtype, held=held, device_map=device_map(device))
        return
    with tempfile.TemporaryDirectory(prefix="mergekit-neuron-offload-") as offload:
        placement: dict[str, Any] = {"device_map": {"": state.device}}
        if state.num_processes == 1 and not (state.device.type == "cpu" and torch.accelerator.is_available()):
            placement = {"device_map": "auto", "offload_folder": offload, "max_memory": max_memory}
        yield load_weights(place, where, dtype=dtype, held=held, **placement)


_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate


def device_map(device: str | None = None) -> Any:
    """Say where a model goes that is loaded for good, as transformers takes it: by default where accelerators are.

    Args:
        device: what the user asked for: ``cpu``, ``cuda``, ``auto``, …

    Raises:
        UserError: there is no such device here, or it computes nothing.
    """
    state = process_state()
    if device is not None and device not in _PLACEMENTS:
        device = resolve_device(device)
    if device is not None or state.device.type == "cpu":
        return device
    return "auto" if state.num_processes == 1 else {"": state.device}


def input_device(model: Any) -> torch.device:
    """Find out where a model's inputs go: its first parameter's device, or where accelerate computes it."""
    execution_device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return torch.device(execution_device) if execution_device is not None else model.device


def computing_dtype(dtype: str) -> str:
    """Resolve ``auto``: as stored; but float32 on a CPU, where 16 bits are several times slower."""
    if dtype == "auto" and process_state().device.type == "cpu":
        return "float32"
    return dtype


def load_processor(processor: Processor, place: Place, where: str) -> Any:
    """Load the tokenizer or image processor saved beside a model; raises UserError if there is none."""
    what = "tokenizer" if processor == "AutoTokenizer" else "image processor"
    try:
        directory = Path(local_copy(place.path, place.revision, weights=False))
        check_files(directory, place.path)
        read_vocabulary(directory)
        with foreign_reading(f"{where}: cannot load its {what}", ImportError):
            return getattr(transformers, processor).from_pretrained(directory, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"{where}: its {what} needs another package: {one_line(error)}") from error
