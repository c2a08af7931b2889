"""What is imported as a command starts is not searched for garbage."""

import gc
import sys

import pytest

from neuron_methods.support.starting import importing


@pytest.fixture(autouse=True)
def nothing_frozen():
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_nothing_is_collected_within_the_block_and_what_an_import_brings_is_frozen(monkeypatch):
    with importing():
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "a module that was not there", gc)
    assert gc.isenabled()
    assert gc.get_freeze_count() > 10_000


def test_nothing_is_frozen_where_all_was_imported_before():
    with importing():
        import json  # noqa: F401
    assert gc.get_freeze_count() < 1000  # what the interpreter itself keeps there


def test_an_import_that_fails_leaves_the_collector_as_it_was():
    with pytest.raises(ImportError), importing():
        raise ImportError("no such thing")
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
