"""The benchmarks of large models and of GPUs, at a size that takes no time."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tests.examples.conftest import EXAMPLES, load_script

sys.path.insert(0, str(EXAMPLES / "benchmarks"))
gpu, scale = (load_script(EXAMPLES / "benchmarks" / f"{name}.py") for name in ("gpu", "scale"))
sys.modules["scale"] = scale  # scale_plan's neighbour
scale_models = sys.modules["scale_models"]
measuring = sys.modules["measuring"]
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


def test_a_row_is_measured_once_and_kept(tmp_path, monkeypatch, capsys):
    kept, at = tmp_path / "rows.json", tmp_path / "models"
    at.mkdir()
    options = ["--size", "tiny", "--methods", "linear", "--threads", "1", "--at", str(at), "--rows", str(kept)]
    monkeypatch.setattr(sys, "argv", ["scale.py", *options])
    scale.main()
    (row,) = scale.read_rows(kept)
    entries = scale.SHAPES["tiny"].parameters
    assert row.read_bytes == 3 * 2 * entries
    assert 2 * entries < row.written_bytes < 4 * entries
    assert 0 < row.own_bytes < row.promised_bytes
    assert row.own_bytes < row.peak_bytes
    assert not list(at.iterdir())
    said = capsys.readouterr().out
    assert "\ntiny, 3 full, linear, 1 processes, cpu: " in said
    assert "| tiny, 3 full | `linear` | 1, cpu | 1.00 × | 1.00 × |" in said
    scale.main()  # which merges nothing anew
    assert scale.read_rows(kept) == [row]


def test_models_are_kept_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "_measure", lambda missing, shape, directory, *_: (directory / "model").touch())
    for options, left in (([], []), (["--keep"], ["neuron-scale-tiny-lora-3/model"])):
        monkeypatch.setattr(
            sys, "argv", ["scale.py", "--size", "tiny", "--kind", "lora", "--at", str(tmp_path), *options]
        )
        scale.main()
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("model")] == left


def test_all_combinations_are_measured_unless_the_disk_is_too_small(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(scale, "_measure", lambda missing, *_: made.append([row.key for row in missing]))
    several = ["--experts", "3", "8", "--processes", "1", "2", "--methods", "linear", "ties", "--device", "cuda"]
    monkeypatch.setattr(sys, "argv", ["scale.py", "--size", "3b", "7b", *several, "--at", str(tmp_path)])
    scale.main()
    assert [len(of_models) for of_models in made] == [4] * 4
    assert made[0][1] == ("3b", "full", 3, "linear", 2, "cuda")
    monkeypatch.undo()
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda _: argparse.Namespace(free=10**9))
    monkeypatch.setattr(sys, "argv", ["scale.py", "--size", "7b", "--at", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^\S+: 53\.\d GB are needed, 1\.0 GB are free; see --at$"):
        scale.main()


def test_generated_models_are_what_transformers_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_models, "_POOL", 1001)
    shape = scale.SHAPES["tiny"]
    base, (first, second, third) = scale_models.write_models(tmp_path, shape, "full", 3, 2)
    expected = dict(shape.tensors())
    loaded = [LlamaForCausalLM.from_pretrained(place, dtype="auto").state_dict() for place in (base, first, second)]
    for weights in loaded:
        assert {name: tuple(weight.shape) for name, weight in weights.items()} == expected
    for name in expected:
        of_base, *of_experts = (weights[name].float() for weights in loaded)
        assert 0.01 < of_base.std() < 0.03
        for weight in of_experts:
            assert 0 < (weight - of_base).std() < 0.001
    assert (Path(third) / "model-00001.safetensors").samefile(Path(first) / "model-00001.safetensors")


def test_adapters_are_planned(tmp_path):
    base, experts = scale.write_models(tmp_path, scale.SHAPES["tiny"], "lora", 2, 1)
    config = tmp_path / "merge.yml"
    config.write_text(scale.configuration("neuro_merging", base, experts))
    assert scale.planned(config).measures


def test_a_plan_needs_no_disk(monkeypatch):
    monkeypatch.setitem(scale.SHAPES, "70b", scale.SHAPES["0.1b"])
    entries = scale.SHAPES["0.1b"].parameters
    row = scale.Row("0.1b", "full", 3, "linear", 1, "cpu", cpu_seconds=1804, read_speed=1e6, write_speed=1e6)
    text = plans.plan_table("70b", [row])
    linear, ties, *_ = text.splitlines()[2:]
    assert "| `ties` |" in ties and "not measured | not measured" in ties
    minutes = 1800 / 3 * 8 / 8 / 60  # of one of eight processes, for eight experts instead of three
    disk = (8 + 1) * 2 * entries / 1e6 / 60
    assert f"| {minutes:.0f} min, {disk:.0f} min |" in linear


def test_a_process_is_measured_and_not_the_one_that_has_begun_it(tmp_path):
    large = bytearray(b"x" * (400 << 20))
    code = "import os, pathlib; large = b'x' * (50 << 20); pathlib.Path('told').write_text(os.environ['MADE'])"
    run = measuring.run_process(
        [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"], {"MADE": "1"}
    )
    assert 50 << 20 < run.peak_bytes < 200 << 20 < len(large)
    assert min(run.cpu_seconds, run.seconds) > 0
    assert (tmp_path / "told").read_text() == "1"
    with pytest.raises(SystemExit, match=r"(?s)failed:.*no such thing"):
        measuring.run_process([sys.executable, "-c", "raise ValueError('no such thing')"])
