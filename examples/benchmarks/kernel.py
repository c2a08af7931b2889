"""The kernel: steps 2 to 4 of `neuro_merging` on one matrix against a batched singular value decomposition.

    python examples/benchmarks/kernel.py [--json FILE]

The peer is the oracle of the tests, which decomposes every neuron's T × d matrix, in float64; float32 is shown as well.
It works on a slice of the rows, and its time is scaled up: each neuron is a problem of its own. Both are handed trimmed
task vectors. The whole merge is shown beside: it also forms and trims the task vectors and writes the merged matrix
(steps 1 and 6). Processor time of the process is compared, the fastest of a few interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine
from torch import Tensor

from neuron_methods.kernels.neuro import NeuroOptions, merge_neurons
from neuron_methods.kernels.rows import row_blocks
from neuron_methods.kernels.subspace import merge_coefficients

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import oracle

EXPERTS = (2, 3, 4, 8)
DENSITY = 0.15


def seconds(function: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def make(neurons: int, width: int, experts: int) -> tuple[Tensor, list[Tensor]]:
    """Base weights and experts of random updates."""
    generator = torch.Generator().manual_seed(experts)
    base = torch.randn(neurons, width, generator=generator) * 0.02
    return base, [base + torch.randn(neurons, width, generator=generator) * 0.002 for _ in range(experts)]


def decompose(task_vectors: Tensor, base: Tensor) -> Tensor:
    """Steps 2 to 4 by the oracle's formulas, all rows at once: (rows, experts, d) and (rows, d) to (rows, d)."""
    coefficients = (task_vectors @ base.unsqueeze(2)) / base.square().sum(1).reshape(-1, 1, 1)
    oracle.elect_and_reduce_rows(coefficients.transpose(0, 1).squeeze(2).unsqueeze(1))
    orthogonal = task_vectors - coefficients * base.unsqueeze(1)
    return oracle.merge_orthogonal(orthogonal, rounding=oracle.ROUNDING if base.dtype == torch.float64 else 1e-7)


def combine(rows: Tensor, merged: Tensor) -> Tensor:
    """Steps 2 to 4 by the kernels: τ_1 … τ_T, w of every neuron, (rows, experts + 1, d), to ψ_⊥, (rows, d)."""
    for block in row_blocks(len(rows), 4 * rows.shape[1] * rows.shape[2], 1 << 28):
        solved = merge_coefficients(rows[block])
        of_base = -(solved.orthogonal * solved.parallel).sum(dim=1, keepdim=True)
        factors = torch.cat([solved.orthogonal, of_base], dim=1).float()
        merged[block] = torch.bmm(factors.unsqueeze(1), rows[block]).squeeze(1)
    return merged


def compare(neurons: int, width: int, experts: int, oracle_rows: int, rounds: int) -> dict[str, float]:
    """Seconds of the kernels and of the oracle, for all rows, and how far their results lie apart."""
    base, others = make(neurons, width, experts)
    rank = int(oracle_rows * width * (1 - DENSITY))
    thresholds = [float((o - base)[:oracle_rows].abs().flatten().kthvalue(rank).values) for o in others]
    rows = torch.stack([*(o - base for o in others), base], dim=1)
    for expert, threshold in enumerate(thresholds):
        rows[:, expert] = oracle.trim(rows[:, expert], threshold)
    wide, narrow = rows[:oracle_rows].double(), rows[:oracle_rows].clone()
    merged = torch.empty_like(base)
    scale = neurons / oracle_rows

    def whole() -> None:
        merge_neurons(base, others, merged, NeuroOptions(thresholds, weights=[1.0] * experts, lambda_orthogonal=1.0))

    contestants: dict[str, tuple[Callable[[], object], float]] = {
        "kernel": (lambda: combine(rows, merged), 1.0),
        "whole merge": (whole, 1.0),
        "oracle": (lambda: decompose(wide[:, :-1], wide[:, -1]), scale),
        "oracle in float32": (lambda: decompose(narrow[:, :-1], narrow[:, -1]), scale),
    }
    fastest = dict.fromkeys(contestants, float("inf"))
    for turn in range(rounds + 1):
        for name, (function, factor) in contestants.items():
            taken = seconds(function) * factor
            fastest[name] = min(fastest[name], taken) if turn else fastest[name]  # the first round warms up
    expected = decompose(wide[:, :-1], wide[:, -1])
    difference = (combine(rows[:oracle_rows], merged[:oracle_rows]).double() - expected).abs().max()
    return {
        "experts": experts,
        **{f"{name.replace(' ', '_')}_seconds": taken for name, taken in fastest.items()},
        "ratio": fastest["oracle"] / fastest["kernel"],
        "ratio_in_float32": fastest["oracle in float32"] / fastest["kernel"],
        "ratio_of_whole_merge": fastest["oracle"] / fastest["whole merge"],
        "largest_difference": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, default=4096)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--oracle-rows", type=int, default=64, help="rows the oracle works on (default: 64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = f"{machine()}, {options.threads} torch thread{'s' * (options.threads > 1)}"
    rows = min(options.oracle_rows, options.neurons)
    print(where)
    print(f"{options.neurons} × {options.width}, float32; oracle on {rows} rows, its time scaled up to all")
    results = []
    for experts in EXPERTS:
        result = compare(options.neurons, options.width, experts, rows, options.rounds)
        results.append(result)
        print(
            f"T = {experts}: kernel {result['kernel_seconds']:.3f} s, {result['ratio']:.1f} × faster than the oracle "
            f"({result['ratio_in_float32']:.1f} × than in float32), results within {result['largest_difference']:.0e}; "
            f"whole merge {result['whole_merge_seconds']:.3f} s, {result['ratio_of_whole_merge']:.1f} ×",
            flush=True,
        )
    growth = {
        name: results[-1][f"{name}_seconds"] / results[0][f"{name}_seconds"] for name in ("kernel", "whole_merge")
    }
    print(
        f"From T = {EXPERTS[0]} to T = {EXPERTS[-1]} ({EXPERTS[-1] / EXPERTS[0]:.0f} × the experts): kernel "
        f"{growth['kernel']:.2f} × the time, whole merge {growth['whole_merge']:.2f} ×"
    )
    if options.json:
        content = {"machine": where, "neurons": options.neurons, "width": options.width, "oracle_rows": rows}
        options.json.write_text(json.dumps({**content, "results": results, "growth": growth}, indent=2) + "\n")


if __name__ == "__main__":
    main()
