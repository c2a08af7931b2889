"""`mergekit-neuron merge` with adapters in and out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from neuron_methods.cli.merge import merge
from tests.adapters.cases import tensors
from tests.support import commands


def run(*arguments: object) -> Result:
    return CliRunner().invoke(merge, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path: Path, made) -> Path:
    models = [{"model": str(made("llama").adapter), "parameters": {"weight": 0.5}}]
    path = tmp_path / "merge.yaml"
    path.write_text(
        yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": str(made("llama").base), "models": models})
    )
    return path


def test_as_adapter(config: Path, tmp_path: Path) -> None:
    done = run(config, tmp_path / "out", "--as-adapter", "--rank", 4, "--adapter-dtype", "float16")
    assert done.exit_code == 0, done.output
    assert "task_arithmetic: a LoRA adapter for" in done.stdout
    assert "q_proj: 2 matrices, rank 4, 100.00 % of the energy" in done.stdout
    assert {str(tensor.dtype) for tensor in tensors(tmp_path / "out").values()} == {"torch.float16"}


def test_quiet_says_only_what_is_lost(config: Path, tmp_path: Path) -> None:
    done = run(config, tmp_path / "out", "--as-adapter", "--rank", 1, "--quiet")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert done.stderr.startswith("warning: less than 90 % of the update's energy is kept in ")
    assert run(config, tmp_path / "good", "--as-adapter", "--energy", 0.999, "--quiet").output == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rank", "4"], "--rank goes with --as-adapter"),
        (["--energy", "0.9"], "--energy goes with --as-adapter"),
        (["--adapter-dtype", "float16"], "--adapter-dtype goes with --as-adapter"),
        (["--as-adapter", "--energy", "1.5"], "1.5 is not in the range"),
        (["--as-adapter", "--rank", "0"], "0 is not in the range"),
    ],
)
def test_usage(options: list[str], says: str, config: Path, tmp_path: Path) -> None:
    done = run(config, tmp_path / "out", *options)
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_of_adapters(config: Path, tmp_path: Path) -> None:
    done = run(config, tmp_path / "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "task_arithmetic" in done.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_of_an_adapter_tells_its_size(config: Path, tmp_path: Path) -> None:
    sizes = []
    for options in ([], ["--as-adapter", "--rank", "1"], ["--as-adapter", "--rank", "2"]):
        done = run(config, tmp_path / "out", "--dry-run", *options)
        assert done.exit_code == 0, done.output
        (size,) = re.findall(r"to write: ([\d.]+) kB", done.stdout)
        sizes.append(float(size))
    assert sizes[1] < sizes[2] < sizes[0]
    assert done.stdout.endswith("\n  as a LoRA adapter of rank 2 at most\n")


def test_what_peft_has_to_merge_first_is_told_in_a_note(made, tmp_path: Path) -> None:
    saved = made("loha")
    models = [{"model": f"{saved.base}+{saved.adapter}", "parameters": {"weight": 1.0}}]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    told = commands.run("mergekit-neuron", "merge", "merge.yaml", "told", folder=tmp_path)
    assert "peft merges it into a temporary directory first" in told.stdout
    assert "WARNING" not in told.stderr
    quiet = commands.run("mergekit-neuron", "merge", "merge.yaml", "quiet", "--quiet", folder=tmp_path)
    assert told.returncode == quiet.returncode == 0
    (note,) = quiet.stderr.splitlines()
    assert quiet.stdout == "" and note.startswith(f"note: {saved.adapter}: adapters of type LOHA")
