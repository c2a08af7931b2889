"""The benchmarks of large models and of GPUs, at a size that takes no time."""

import argparse
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.examples.conftest import EXAMPLES, load_script

sys.path.insert(0, str(EXAMPLES / "benchmarks"))
gpu, scale = (load_script(EXAMPLES / "benchmarks" / f"{name}.py") for name in ("gpu", "scale"))
sys.modules["scale"] = scale  # scale_plan's neighbour
plans = load_script(EXAMPLES / "benchmarks" / "scale_plan.py")


def test_parity_and_speed_are_told_of_every_method(capsys, monkeypatch, tmp_path):
    arguments = ["gpu.py", "--device", "cpu", "--width", "64", "--rounds", "1", "--json", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    figures = json.loads((tmp_path / "figures").read_text())
    said = capsys.readouterr().out
    for method in gpu.METHODS:
        assert figures[method]["relative error"] == 0
        assert figures[method]["bytes a second"] > 0
        assert f"{method}: 0.0e+00 from the CPU's" in said


def test_whole_merges_are_held_to_the_cpu(capsys, monkeypatch, tmp_path):
    methods = ["neuron_merge", "neuron_response"]
    arguments = ["--device", "cpu", "--whole", "tiny", "--json", str(tmp_path / "figures"), "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures.keys() == {f"{method}, {kind}" for method in methods for kind in ("full", "lora")}
    assert all(each["differ"] == 0 for each in figures.values())
    assert "neuron_merge, 3 lora of tiny" in capsys.readouterr().out


def test_outputs_that_differ_are_told_apart(tmp_path):
    for name, values in (("one", [1.0, 2.0, -3.0, 0.0]), ("other", [1.0, 2.03125, -3.0, 0.0])):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(values, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    assert gpu.apart(tmp_path / "one", tmp_path / "other") == (0.25, 2.0)  # bf16 is spaced by 2^-6 from 2 to 4


def test_without_a_gpu_it_says_so_in_a_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"^no CUDA device here; [^\n]*$"):
        gpu.main()


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(
        size="tiny", experts=3, kind="full", distinct=2, methods=["linear"], processes=1, threads=1,
        rows=tmp_path / "rows.json",
    )  # fmt: skip


def test_a_row_is_measured_once_and_kept(arguments, tmp_path):
    rows = scale.read_rows(arguments.rows)
    scale.measure(arguments, tmp_path / "models", rows)
    assert scale.read_rows(arguments.rows) == rows
    (row,) = rows
    entries = scale.SHAPES["tiny"].parameters
    assert row.read_bytes == 3 * 2 * entries
    assert 2 * entries < row.written_bytes < 4 * entries
    assert 0 < row.own_bytes < row.promised_bytes
    assert row.own_bytes < row.peak_bytes
    assert not (tmp_path / "models" / "merged").exists()
    third, first = (tmp_path / "models" / f"full-{index}" / "model-00001.safetensors" for index in (2, 0))
    assert third.samefile(first)
    scale.measure(arguments, tmp_path / "models", rows)  # which makes nothing anew
    assert rows == [row]
    assert "| tiny, 3 full | `linear` | 1 | 1.00 × | 1.00 × |" in scale.table(rows)


def test_adapters_are_planned(arguments, tmp_path):
    base, experts = scale.write_models(tmp_path, scale.SHAPES["tiny"], "lora", 2, 1)
    config = tmp_path / "merge.yml"
    config.write_text(scale.configuration("neuro_merging", base, experts))
    assert scale.planned(config).measures


def test_a_plan_needs_no_disk(monkeypatch):
    monkeypatch.setitem(scale.SHAPES, "70b", scale.SHAPES["0.1b"])
    entries = scale.SHAPES["0.1b"].parameters
    row = scale.Row("0.1b", "full", 3, "linear", 1, cpu_seconds=1804, read_speed=1e6, write_speed=1e6)
    text = plans.plan_table("70b", [row])
    linear, ties, *_ = text.splitlines()[2:]
    assert "| `ties` |" in ties and "not measured | not measured" in ties
    minutes = 1800 / 3 * 8 / 8 / 60  # of one of eight processes, for eight experts instead of three
    disk = (8 + 1) * 2 * entries / 1e6 / 60
    assert f"| {minutes:.0f} min, {disk:.0f} min |" in linear
