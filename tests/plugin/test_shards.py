"""Shards that a thread writes while the next tensor is merged: what mergekit's own writer leaves, and nothing half."""

from __future__ import annotations

import json
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from mergekit.io.tensor_writer import TensorWriter
from safetensors.torch import load_file

from neuron_methods.models.headers import header_entries
from neuron_methods.plugin.layout import packed, write_shards
from neuron_methods.plugin.shards import WAITING, PlannedShape, ShardWriter
from neuron_methods.plugin.work import Work

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "transposed": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T,
    "odd": torch.ones(3, dtype=torch.float16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flag": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "one": torch.tensor(7, dtype=torch.int32),
    'nämé "quoted"': torch.zeros(5, 5),
    "count": torch.tensor(3),
}


PLANNED = [PlannedShape(name, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def write(place: Path, planned: list[PlannedShape] = PLANNED) -> Path:
    writer = ShardWriter(place, planned)
    try:
        for name, tensor in TENSORS.items():
            writer.save_tensor(name, tensor)
        writer.finish()
        writer.close()
    finally:
        writer.abandon()
    return place


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shard writer"]


@pytest.mark.parametrize("size", [10**9, 60])
def test_a_merge_leaves_what_mergekits_writer_leaves(tmp_path, size):
    theirs = TensorWriter(str(tmp_path / "theirs"), max_shard_size=size)
    for name, tensor in TENSORS.items():
        theirs.save_tensor(name, tensor)
    theirs.finalize()
    work = Work(tmp_path / "out")
    work.groups = packed(((name, tensor.nbytes) for name, tensor in TENSORS.items()), size)
    work.shapes = {shape.name: shape for shape in PLANNED}
    work.open({}, "out", resume=False, anew=False)
    with work.writing():
        work.start(work.groups)
        for name in reversed(TENSORS):  # in any order
            work.take(name, {name: TENSORS[name]})
    (tmp_path / "ours").mkdir()
    write_shards(work, tmp_path / "ours", safe=True)
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    assert (len(files) > 1) == (size == 60)
    for name in files:
        theirs, ours = tmp_path / "theirs" / name, tmp_path / "ours" / name
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
            continue
        expected, found = load_file(theirs), load_file(ours)
        assert found.keys() == expected.keys()
        for tensor in expected:
            assert found[tensor].dtype == expected[tensor].dtype
            assert torch.equal(found[tensor], expected[tensor])
    assert not writing_threads()


def test_every_tensor_is_aligned_to_its_numbers(tmp_path):
    data, entries = header_entries(write(tmp_path / "a.safetensors"))
    for name, entry in entries.items():
        assert (data + entry.data_offsets[0]) % TENSORS[name].element_size() == 0, name


def test_a_header_takes_no_more_room_than_is_planned(tmp_path):
    begin, entries = header_entries(write(tmp_path / "a.safetensors"))
    assert begin < 100 + 110 * (len(entries) + 1)


def test_a_shard_of_which_nothing_came_is_empty(tmp_path):
    writer = ShardWriter(tmp_path / "a.safetensors", PLANNED)
    writer.finish()
    writer.close()
    assert load_file(tmp_path / "a.safetensors") == {}


def test_what_fails_in_the_thread_fails_the_merge(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        write(tmp_path / "gone" / "a.safetensors")
    assert not writing_threads()


def test_a_writer_that_is_abandoned_completes_no_shard(tmp_path):
    writer = ShardWriter(tmp_path / "a.safetensors", PLANNED)
    for name, tensor in TENSORS.items():
        writer.save_tensor(name, tensor)
    writer.abandon()
    assert {path.name for path in tmp_path.iterdir()} <= {"a.part"}
    assert not writing_threads()
    with pytest.raises(RuntimeError, match="the merge has ended"):
        writer.save_tensor("late", torch.ones(2))


def test_no_more_tensors_wait_than_it_says(tmp_path, monkeypatch):
    gate, begun = threading.Event(), threading.Event()
    write_one = ShardWriter._write

    def slowly(writer, name, tensor):
        begun.set()
        gate.wait()
        write_one(writer, name, tensor)

    monkeypatch.setattr(ShardWriter, "_write", slowly)
    writer = ShardWriter(tmp_path / "model.safetensors", [PlannedShape(str(index), (8,)) for index in range(6)])
    alive: list[weakref.ref] = []

    def merge() -> None:
        for index in range(6):
            tensor = torch.full((8,), float(index))
            alive.append(weakref.ref(tensor.untyped_storage()))
            writer.save_tensor(str(index), tensor)
            del tensor

    merging = threading.Thread(target=merge)
    merging.start()
    begun.wait()
    while len(alive) <= WAITING:
        time.sleep(0.01)
    merging.join(0.1)  # in which a queue without end would have taken more
    assert len(alive) == WAITING + 1  # those, and the one that finds no room
    gate.set()
    merging.join()
    writer.finish()
    writer.close()
    assert not any(reference() for reference in alive[:-1])
    assert len(load_file(tmp_path / "model.safetensors")) == 6


def test_an_interrupted_merge_leaves_no_thread_and_no_file(workspace):
    from neuron_methods.plugin.merging import MergeWitness, merge_to_directory
    from tests.support.merges import configuration

    workspace("llama-tied")

    def interrupt(name, *_):
        if "layers.1" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_to_directory(
            configuration(), "out", progress=False, witness=MergeWitness(lambda *_: [], on_tensor=interrupt)
        )
    assert not Path("out").exists()
    assert not writing_threads()


def test_a_signal_at_any_moment_leaves_a_writer_that_ends(tmp_path):
    """An exception out of a signal's handler comes between any two steps of the interpreter."""

    class Ended(BaseException):
        pass

    def end(*_):
        raise Ended

    before = signal.signal(signal.SIGALRM, end)
    try:
        for trial in range(300):
            writer = ShardWriter(tmp_path / f"{trial}.safetensors", PLANNED)
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4 + 1e-5 * (trial % 100))
                while True:
                    writer.save_tensor("scalar", TENSORS["scalar"])
            except Ended:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            ending = threading.Thread(target=writer.abandon, daemon=True)
            ending.start()
            ending.join(20)
            assert not ending.is_alive(), trial
    finally:
        signal.signal(signal.SIGALRM, before)
