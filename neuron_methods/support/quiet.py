"""Silence of packages underneath, where ours has its own account of what it does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from showing progress bars and warnings, and from asking anything, while the block lasts."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # transformers 5.23 asks on stdin whether to run a model's code wherever it is not told: of a class within a class
    # it never is. Where it may wait for no time, it says what was not allowed.
    patience, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
