"""An adapter that was written, read back: all there, as it was made, and as peft would load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict

from neuron_methods.adapters.checkpoint_names import Skeleton
from neuron_methods.adapters.weights_file import SAFETENSORS_NAME
from neuron_methods.models.headers import Header, stored_headers
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


def _spelled(header: Header) -> str:
    return str(header.dtype).removeprefix("torch.")


def _verify_places(directory: Path, written: Mapping[str, Header], skeleton: Skeleton) -> None:
    """Let peft build the adapter's modules on torch's meta device, and compare them with what is stored."""
    try:
        config = PeftConfig.from_pretrained(directory)
    except (KeyError, OSError, TypeError, ValueError):
        raise UserError("verification failed: adapter_config.json was not written completely") from None
    try:
        model = PeftModel(skeleton.model, config, low_cpu_mem_usage=True)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"verification failed: peft cannot load the adapter: {first_line(error)}") from None
    for key, header in written.items():
        if key not in expected:
            raise UserError(f"verification failed: peft would not find a place for {key}")
        shape = list(expected[key].shape)
        if shape != list(header.shape):
            raise UserError(f"verification failed: peft would take {key} of shape {shape}, not {list(header.shape)}")
    # Of biases only those that changed are stored; the others stay the base's.
    if missing := sorted(key for key in expected.keys() - written.keys() if ".lora_" in key):
        raise UserError(f"verification failed: peft would miss {missing[0]}")
