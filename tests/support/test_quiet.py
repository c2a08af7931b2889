"""Silence lasts as long as it is asked for."""

import pytest

from neuron_methods.support.quiet import quiet_transformers


def test_transformers_is_as_talkative_after_as_before():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        raise RuntimeError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
