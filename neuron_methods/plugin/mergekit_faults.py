"""What is wrong in mergekit 0.1.5's `run_merge` and has to be put right from outside while it runs.

What must hold under mergekit's own commands, too, is in `neuron_methods.plugin.registration`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import mergekit.io.tasks
import mergekit.tokenizer.build
import torch


@contextmanager
def quiet_mergekit() -> Iterator[None]:
    """Keep two things of mergekit 0.1.5 off the terminal that no user can do anything about.

    It sets `torch_dtype` on the output's config, which transformers 5 calls deprecated at every run; and its bar over
    tokenizer permutations shows even where `quiet` is set.
    """

    def passes(record: logging.LogRecord) -> bool:
        return "`torch_dtype` is deprecated" not in record.getMessage()

    log = logging.getLogger("transformers.configuration_utils")
    module = mergekit.tokenizer.build
    original = module.tqdm
    log.addFilter(passes)
    module.tqdm = SimpleNamespace(tqdm=lambda iterable, **_: iterable)
    try:
        yield
    finally:
        log.removeFilter(passes)
        module.tqdm = original


@contextmanager
def any_dtype_name() -> Iterator[None]:
    """Let mergekit 0.1.5 save buffers of bool and short integers: its table of dtypes ends at int64."""
    module = mergekit.io.tasks
    original = module.dtype_from_name

    def dtype_from_name(name: str | None) -> torch.dtype | None:
        return getattr(torch, name or "", None) or original(name)

    module.dtype_from_name = dtype_from_name
    try:
        yield
    finally:
        module.dtype_from_name = original
