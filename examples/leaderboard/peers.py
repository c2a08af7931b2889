"""FusionBench's methods for the leaderboard: the functions of its pip package, on the zoo's weights."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import Weights

from neuron_methods.methods.inputs_file import InputsFile


def tsv_m(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run TSV-M."""
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    update = TSVM_utils.compute_and_sum_svd_mem_reduction(task_vectors(base, experts), accelerator="cpu")
    return _added(base, update)


def iso_c(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run Iso-C."""
    from fusion_bench.method.isotropic_merging import iso_utils

    return _added(base, iso_utils.iso_c(task_vectors(base, experts), accelerator="cpu"))


def iso_cts(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run Iso-CTS; `settings` are ``common_space_fraction``."""
    from fusion_bench.method.isotropic_merging import iso_utils

    return _added(base, iso_utils.iso_cts(task_vectors(base, experts), accelerator="cpu", **settings))


def wudi(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run WUDI-Merging; `settings` are ``iter_num``."""
    from fusion_bench.method.wudi.wudi import wudi_merging

    with contextlib.redirect_stderr(io.StringIO()):  # a bar for each tensor
        update = wudi_merging(task_vectors(base, experts), accelerator="cpu", **settings)
    return _added(base, {name: tensor.detach() for name, tensor in update.items()})


def calibrated(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run singular value calibration over another merge.

    Args:
        base: θ₀.
        experts: by task.
        settings: ``of``, a function's name here, and the scale of that merge, ``scaling_factor``; and ``alpha``.

    Returns:
        The merge; as in the package, what is no matrix stays as the other has it.
    """
    from fusion_bench.method.singular_value_calibration.utils import (
        subspace_consistency_spectral_calibration_accelerated,
    )

    whole = {"task_arithmetic": _summed, "tsv_m": tsv_m}[settings["of"]](base, experts, {})
    merged = {name: base[name] + settings["scaling_factor"] * (whole[name] - base[name]) for name in base}
    for name, tensor in merged.items():
        if tensor.ndim == 2:
            tasks = [expert[name] for expert in experts.values()]
            merged[name] = subspace_consistency_spectral_calibration_accelerated(
                base[name], tasks, tensor, settings["alpha"], "cpu"
            )
    return merged


def reg_mean(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    """Run RegMean with the measured inputs of every expert's linear layers.

    Args:
        base: θ₀, all that an expert changed.
        experts: by task.
        settings: ``reduce_non_diagonal_ratio``; and what the row is handed: the directory of ``measured`` inputs.
    """
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    moments = []
    for task in experts:
        file = InputsFile.open(str(Path(settings["measured"]) / f"{task}.safetensors"))
        read = {factor: file.read(factor).float() for factor in set(file.info.modules.values())}
        squares = {factor: tensor.T @ tensor for factor, tensor in read.items()}
        linear = {path for path in file.info.modules if f"{path}.weight" in base and base[f"{path}.weight"].ndim == 2}
        moments.append({path: squares[file.info.modules[path]] for path in linear})
    shared = set.intersection(*(set(each) for each in moments))
    return merging_with_regmean_weights(
        {name: [expert[name] for expert in experts.values()] for name in base},
        [{path: each[path] for path in shared} for each in moments],
        reduce_non_diagonal_ratio=settings["reduce_non_diagonal_ratio"],
    )


def task_vectors(base: Weights, experts: Mapping[str, Weights]) -> list[Weights]:
    """Compute θ_t − θ₀ of each expert."""
    return [{name: expert[name] - base[name] for name in base} for expert in experts.values()]


def _summed(base: Weights, experts: Mapping[str, Weights], settings: Mapping[str, Any]) -> Weights:
    return {name: base[name] + sum(each[name] for each in task_vectors(base, experts)) for name in base}


def _added(base: Weights, update: Mapping[str, Any]) -> Weights:
    return {name: base[name] + update[name] for name in base}
