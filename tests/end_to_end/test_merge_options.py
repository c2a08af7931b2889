"""The options of `mergekit-neuron merge`."""

import os
from pathlib import Path
from textwrap import dedent

import torch
import yaml
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.methods.neuro_merging import NeuroMerging
from tests.support.checkpoints import configuration, edit, read
from tests.support.commands import invoke, refused
from tests.support.merges import UP, same


def test_a_dry_run_prints_the_plan_and_writes_nothing(workspace):
    workspace("llama-tied")
    Path("merge.yaml").write_text(configuration())
    before = sorted(Path().rglob("*"))
    result = invoke("new/out", "--dry-run")
    assert "neuro_merging of 2 models on base base: expert-a, expert-b" in result.stdout
    assert "to read: 109.4 kB (two passes" in result.stdout
    assert result.stderr == ""
    assert sorted(Path().rglob("*")) == before


def test_a_dry_run_refuses_what_the_merge_would(workspace):
    folder = workspace("llama-tied")
    edit(folder / "expert-b", lambda tensors: tensors.pop(UP))
    assert "is missing from its checkpoint" in refused("--dry-run")


def test_quiet_says_only_what_was_left_out(workspace):
    folder = workspace("llama-tied")
    for method in ("neuro_merging", "min_merging"):  # this one finds what is no note
        result = invoke(method, "-q", method=method)
        assert (result.stdout, result.stderr) == ("", "")
    edit(folder / "expert-a", lambda tensors: tensors.update(value_head=torch.zeros(2)))
    result = invoke("noted", "--quiet")
    assert result.stdout == ""
    assert result.stderr == "note: left out, as only expert-a stores them and no method merges them: value_head\n"


def test_threads_change_nothing_but_rounding(workspace):
    threads = torch.get_num_threads()
    workspace("t5-gated")
    try:
        for count in (1, 2):
            invoke(f"out{count}", "--quiet", "-j", count)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    one, two = read(Path("out1")), read(Path("out2"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_a_seed_makes_random_methods_repeatable(workspace):
    workspace("llama-tied")
    parameters = {"density": 0.5, "weight": 1.0}
    for out, seed in (("one", 3), ("two", 3), ("three", 4)):
        invoke(out, "--quiet", "--random-seed", seed, method="dare_linear", parameters=parameters)
    one, two, three = (read(Path(out)) for out in ("one", "two", "three"))
    assert same(one, two)
    assert not same(one, three)


def test_options_of_the_output(workspace):
    workspace("llama-tied")
    invoke(
        "bare", "--quiet", "--no-write-model-card", "--no-copy-tokenizer", "--out-shard-size", "5K", "--device", "auto"
    )
    names = sorted(os.listdir("bare"))
    assert "README.md" not in names
    assert "model.safetensors.index.json" in names
    invoke("bare", "--quiet", "--force")
    assert sorted(p.name for p in Path("bare").glob("model*")) == ["model.safetensors"]


def test_help_teaches(workspace):
    text = CliRunner().invoke(main, ["merge", "--help"]).stdout
    for part in ("--dry-run", "--force", "--profile-out", "--allow-nonfinite", "--lazy-unpickle", "lambda_orthogonal"):
        assert part in text
    # Its example works as it stands.
    example = dedent(text.partition("with every parameter at its default:\n")[2].partition("\n\n")[0])
    workspace("llama-tied")
    Path("merge.yaml").write_text(example)
    result = CliRunner().invoke(main, ["merge", "merge.yaml", "out", "--quiet"])
    assert result.exit_code == 0, result.stderr
    shared = {parameter.name for parameter in NeuroMerging.spec.shared_parameters}
    assert yaml.safe_load(example)["parameters"].keys() == shared - {"profile"}
