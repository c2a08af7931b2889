"""The kernel of `neuro_merging` against a batched singular value decomposition, on one 4096 × 4096 matrix.

    python examples/benchmarks/kernel.py

Ours is timed whole (trim, split, merge, scale, from bf16 weights); the peer does steps 2 to 4 alone, on task vectors
that are trimmed already: it is the batched-SVD oracle of the tests in float32, on a slice of the rows, its time scaled
up to all of them. The two results are compared, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import machine
from torch import Tensor

from neuron_methods.methods.neuro_merging import merge_neurons

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.oracle import merge_orthogonal

SIZE, SLICE, DENSITY = 4096, 256, 0.15


def best(function: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def peer(base: Tensor, task_vectors: Tensor) -> Tensor:
    """Steps 2 to 4 by a batched SVD: base (rows, d), trimmed task vectors (rows, experts, d), both float32."""
    coefficients = torch.einsum("ntd,nd->nt", task_vectors, base) / base.square().sum(dim=1, keepdim=True)
    orthogonal = task_vectors - coefficients.unsqueeze(2) * base.unsqueeze(1)
    return merge_orthogonal(orthogonal, rounding=1e-6)


def main() -> None:
    """Run the benchmark and print its ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="calls of each, the fastest counts (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base = (0.02 * torch.randn(SIZE, SIZE)).bfloat16()
    experts = [(base.float() + 0.001 * torch.randn(SIZE, SIZE)).bfloat16() for _ in range(8)]
    task_vectors = [expert.float() - base.float() for expert in experts]
    thresholds = [float(tau.abs().flatten()[:1000000].quantile(1 - DENSITY)) for tau in task_vectors]
    ours, theirs, difference = {}, {}, 0.0
    for count in (2, 3, 4, 8):
        merged = torch.empty(SIZE, SIZE)
        settings = {"thresholds": thresholds[:count], "weights": [1.0] * count, "lambda_orthogonal": 1.0}
        ours[count] = best(partial(merge_neurons, base, experts[:count], merged, **settings), arguments.rounds)
        rows = slice(0, SLICE)
        trimmed = [tau[rows] * (tau[rows].abs() >= at) for tau, at in zip(task_vectors, thresholds, strict=True)]
        stacked = torch.stack(trimmed[:count], dim=1)
        theirs[count] = best(partial(peer, base[rows].float(), stacked), 1) * SIZE / SLICE
        psi = peer(base[rows].float(), stacked)
        difference = max(difference, float((merged[rows] - base[rows].float() - psi).abs().median()))
        print(f"  {count} experts: {ours[count]:.2f} s, batched SVD {theirs[count]:.1f} s", flush=True)
    figures = {
        "machine": machine(),
        "times faster than batched SVD": {count: theirs[count] / ours[count] for count in ours},
        "time of 8 experts over 2": ours[8] / ours[2],
        "median difference from batched SVD": difference,
        "seconds": ours,
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
