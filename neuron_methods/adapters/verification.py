"""An adapter that was written, read back: all there, as it was made, and as peft would load it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoConfig

from neuron_methods.adapters.completeness import refuse_other_ranks
from neuron_methods.adapters.config import AdapterConfig, refuse_unknown
from neuron_methods.adapters.keys import sort_keys
from neuron_methods.adapters.own_head import find_own_head, trained_class
from neuron_methods.adapters.patterns import check_patterns
from neuron_methods.adapters.weights_file import SAFETENSORS_NAME, AdapterWeights
from neuron_methods.models.headers import Header, stored_count, stored_headers
from neuron_methods.models.model_files import check_files, foreign_reading, read_model_config
from neuron_methods.models.reference import base_of
from neuron_methods.models.skeleton import Skeleton
from neuron_methods.models.verification import Verified
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line


def verify_adapter(directory: Path, made: Mapping[str, Header], skeleton: Skeleton) -> None:
    """Make sure that an adapter's directory holds what was made, and that peft finds a place for all of it.

    Args:
        directory: holds the adapter's two files.
        made: {key: header} of what was to be written.
        skeleton: of the base; peft puts the adapter's modules into its model.

    Raises:
        UserError: naming the tensor that is missing, wrong or without a place, or the file that is damaged.
    """
    try:
        written = stored_headers(directory, SAFETENSORS_NAME)
    except UserError as error:
        raise UserError(f"verification failed: {error}") from None
    for key in written.keys() - made.keys():
        raise UserError(f"verification failed: {key} is in the output, and not of this merge")
    for key, header in made.items():
        if key not in written:
            raise UserError(f"verification failed: {key} is missing from the output")
        shape, dtype = list(written[key].shape), _spelled(written[key])
        if shape != list(header.shape):
            raise UserError(f"verification failed: {key} has shape {shape}, expected {list(header.shape)}")
        if dtype != _spelled(header):
            raise UserError(f"verification failed: {key} is {dtype}, expected {_spelled(header)}")
    _verify_places(directory, written, skeleton)


def verify_adapter_directory(place: Path, *, trust_remote_code: bool = False) -> Verified:
    """Make sure that peft would load an adapter's directory onto the base that its config names.

    Args:
        place: the directory.
        trust_remote_code: whether the base's custom code may be run.

    Raises:
        UserError: naming the file that is damaged, the type that peft does not know, or the tensor that is missing,
            without a place or of another shape.
    """
    config = AdapterConfig.read(str(place), str(place))
    refuse_unknown(config)
    file = AdapterWeights(str(place), str(place))
    shapes = file.shapes
    skeleton, reason = _skeleton_of_base(config, file, place, trust_remote_code)
    if skeleton is None:
        return Verified("adapter", len(shapes), "its headers", [f"{reason}, so it was not held against its base"])
    headers = stored_headers(place, SAFETENSORS_NAME)
    check_patterns(config, skeleton.modules)
    refuse_other_ranks(config, shapes)
    try:
        _verify_places(place, headers, skeleton)
    except UserError as error:
        raise UserError(
            f"{place}: {str(error).removeprefix('verification failed: ')}; save the adapter again"
        ) from None
    by = f"peft {peft.__version__} on {type(skeleton.model).__name__}"
    return Verified("adapter", len(headers), by)


def _skeleton_of_base(
    config: AdapterConfig, file: AdapterWeights, place: Path, trust_remote_code: bool
) -> tuple[Skeleton | None, str]:
    """The skeleton of what was trained, as far as the base's config is here, and else why not; no network is asked."""
    try:
        base = base_of(config.raw, str(place), str(place))
    except UserError as error:
        return None, f"its base is not on this machine ({first_line(error)})"
    options = {"revision": base.revision, "local_files_only": True, "trust_remote_code": trust_remote_code}
    if os.path.isdir(base.path):
        check_files(base.path, base.path)
        read_model_config(Path(base.path, "config.json"), stored_count(Path(base.path)))
    try:
        with foreign_reading(f"{place}: the config of its base {config.base_model}", OSError):
            found = AutoConfig.from_pretrained(base.path, **options)
    except OSError:
        return None, f"the config of its base {config.base_model} is not on this machine"
    if (own := find_own_head(config, file, found, sort_keys(file.shapes)[1])) is not None:
        return Skeleton.build(own.model, own.config), ""
    model = trained_class(config, found, base.path, trust_remote_code=trust_remote_code)
    if model is None:
        return None, f"its base is a {(found.architectures or ['model'])[0]}, a class that is not to be had"
    return Skeleton.build(model, found), ""


def _spelled(header: Header) -> str:
    return str(header.dtype).removeprefix("torch.")


def _verify_places(directory: Path, written: Mapping[str, Header], skeleton: Skeleton) -> None:
    """Let peft build the adapter's modules on torch's meta device, and compare them with what is stored."""
    try:
        config = PeftConfig.from_pretrained(directory)
    except Exception:  # whatever peft makes of foreign values
        raise UserError("verification failed: adapter_config.json was not written completely") from None
    try:
        with warnings.catch_warnings():
            # peft 0.21 tells what may happen when somebody merges or converts the adapter; nobody does here.
            warnings.simplefilter("ignore")
            model = PeftModel(skeleton.model, config, low_cpu_mem_usage=True)
            expected = get_peft_model_state_dict(model, save_embedding_layers=False)
            # With a targeted or resized embedding peft stores the base's own weights, too, by their names in memory.
            places = model.state_dict() | expected
    except Exception as error:
        raise UserError(f"verification failed: peft cannot load the adapter: {first_line(error)}") from None
    for key, header in written.items():
        if key not in places:
            raise UserError(f"verification failed: peft would not find a place for {key}")
        shape = list(places[key].shape)
        if shape != list(header.shape):
            raise UserError(f"verification failed: peft would take {key} of shape {shape}, not {list(header.shape)}")
    # Of biases only those that changed are stored; the others stay the base's.
    if missing := sorted(key for key in expected.keys() - written.keys() if ".lora_" in key):
        raise UserError(f"verification failed: peft would miss {missing[0]}")
    stored = {key: torch.empty(tuple(header.shape), device="meta") for key, header in written.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unexpected = set_peft_model_state_dict(model, stored).unexpected_keys
    except KeyError as error:
        raise UserError(f"verification failed: peft would miss {error.args[0]}") from None
    except Exception as error:
        raise UserError(f"verification failed: peft cannot load the adapter: {first_line(error)}") from None
    # Prompts have no place among the modules, so that they count as unexpected there; peft has read them apart.
    read = expected.keys() if config.is_prompt_learning else ()
    if left := [key for key in unexpected if key not in read]:
        raise UserError(f"verification failed: peft would not find a place for {left[0]}")
