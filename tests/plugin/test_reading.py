"""What is read ahead: the next tensors of each checkpoint, once, in the order of each pass; a hint and no more."""

from __future__ import annotations

import os
import threading

import torch

from neuron_methods.plugin.checkpoints import CheckpointLoader
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.plugin.reading import AHEAD, Order, ReadAhead
from tests.support.checkpoints import configuration
from tests.support.merges import merged, same


def test_what_comes_next_is_listed_once():
    order = Order([["b", "a", "d", "c"]])
    assert order.after("b") == ["a", "d"]
    assert order.after("b") == []
    assert order.after("a") == ["c"]
    assert order.after("c") == []
    assert order.after("b") == []


def test_a_second_pass_has_its_own_order():
    order = Order([["b", "a", "c"], [], ["a", "b", "c"]])
    assert order.after("b") == ["a", "c"]
    assert order.after("a") == order.after("c") == []
    assert order.after("a") == ["b", "c"]


def test_what_is_read_out_of_order_is_followed_by_nothing():
    order = Order([["a", "b", "c", "d"], ["d", "c", "b", "a"]])
    assert order.after("d") == []
    assert order.after("a") == []  # which is behind
    assert order.after("b") == ["a"]  # with which the next pass may begin
    assert Order([]).after("a") == []


def test_the_hints_are_where_the_tensors_lie(workspace, monkeypatch):
    folder = workspace("llama-tied")
    hints = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, *hint: hints.append(hint))
    loader = CheckpointLoader.open(str(folder / "base"))
    names = sorted(loader.index.tensor_paths)
    ahead = ReadAhead(lambda: [names])
    for name in names:
        ahead.reached(loader, name)
    ahead._thread.shutdown()  # having read all
    data = (folder / "base" / "model.safetensors").read_bytes()
    assert len(hints) == len(names) - 1
    for name, (begin, length, _) in zip(names[1:], hints, strict=True):
        expected = loader.get_tensor(name).contiguous().reshape(-1)
        assert data[begin : begin + length] == expected.view(torch.uint8).numpy().tobytes()


def test_a_merge_reads_ahead_in_every_checkpoint_and_ends_its_thread(workspace, monkeypatch):
    folder = workspace("llama-tied")
    expected = merged(out="before")
    read = []
    own = ReadAhead._read
    monkeypatch.setattr(ReadAhead, "_read", lambda self, file, name: (read.append((file, name)), own(self, file, name)))
    merge_to_directory(configuration(), "out", progress=False)
    for model in ("base", "expert-a", "expert-b"):
        names = [name for file, name in read if file.resolve() == folder / model / "model.safetensors"]
        assert len(names) > len(set(names)) > AHEAD  # measured, then merged
    assert same(merged(out="again"), expected)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read ahead")]


def test_a_file_that_is_gone_is_no_matter_of_the_hint(workspace):
    folder = workspace("llama-tied")
    loader = CheckpointLoader.open(str(folder / "base"))
    ahead = ReadAhead(lambda: [sorted(loader.index.tensor_paths)])
    (folder / "base" / "model.safetensors").unlink()
    future = ahead._thread.submit(ahead._read, folder / "base" / "model.safetensors", "x")
    assert future.result() is None
    ahead.close()
