"""`mergekit-neuron merge`, run as a user runs it; and mergekit's own commands with our method.

What needs a process of its own runs in one: signals, limits, the umask, output streams, entry points. The rest of the
command line runs in this process.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import yaml
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.methods.neuro_merging import NeuroMerging
from tests.support.checkpoints import build, configuration, edit, fine_tune, read, save

SCRIPTS = Path(sysconfig.get_path("scripts"))
EXPERTS = ("expert-a", "expert-b")
UP = "model.layers.1.mlp.up_proj.weight"


def environment(**changes):
    unwanted = ("MERGEKIT_NEURON_", "PYTHONHASHSEED")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def run(command, *args, folder, preexec_fn=None, **changes):
    return subprocess.run(
        [SCRIPTS / command, *map(str, args)],
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=preexec_fn,
    )


def invoke(*args, code=0, **keys):
    """The command in this process, on a configuration with `keys`, in the current directory."""
    Path("merge.yaml").write_text(configuration(**keys))
    result = CliRunner().invoke(main, ["merge", "merge.yaml", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def refused(*args, code=1, **keys):
    """The one line of an error; nothing else is said, nothing is left behind."""
    Path("merge.yaml").write_text(configuration(**keys))
    before = sorted(os.listdir())
    result = invoke("out", *args, code=code, **keys)
    assert result.stdout == ""
    assert sorted(os.listdir()) == before
    assert "Traceback" not in result.stderr
    if code == 1:
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
    return result.stderr


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- a user's run


@pytest.fixture(scope="module")
def merged(checkpoints, tmp_path_factory):
    """A folder with a family and what one run of the command made of it, with the run itself."""
    folder = tmp_path_factory.mktemp("run") / "work"
    shutil.copytree(checkpoints("llama-tied"), folder)
    (folder / "merge.yaml").write_text(configuration(dtype="bfloat16"))
    done = run(
        "mergekit-neuron",
        "merge",
        "merge.yaml",
        "nested/out",
        "--profile-out",
        "profile.json",
        folder=folder,
        preexec_fn=lambda: os.umask(0o027),
        PYTHONHASHSEED="1",
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_command_leaves_a_model(merged):
    folder, _ = merged
    out = folder / "nested" / "out"
    assert sorted(os.listdir(out)) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "model.safetensors",
    ]
    assert len(read(out)) == 20
    assert os.listdir(folder / "nested") == ["out"]
    assert json.loads((folder / "profile.json").read_text())["format"] == "mergekit-neuron/trim-profile"


def test_files_have_ordinary_permissions(merged):
    out = merged[0] / "nested" / "out"
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750


def test_the_command_shows_progress_with_names_and_a_summary(merged):
    _, done = merged
    bars = set(re.findall(r"^([A-Z][^:]*): 0 of \d+ tensors", done.stderr, re.MULTILINE))
    assert "\r" not in done.stderr  # which is no terminal
    assert bars == {"Measuring trim thresholds", "Merging tensors"} or bars == {
        "Measuring trim thresholds",
        "Measuring the last bits of the thresholds",
        "Merging tensors",
    }
    assert "deprecated" not in done.stderr
    assert "arning" not in done.stderr
    for part in ("tensors, ", "read, ", "written, ", "sigma", "automatic lambda_orthogonal", "% parallel"):
        assert part in done.stdout
    assert done.stdout.endswith("complete and verified: nested/out\n")


def test_another_process_gives_the_same_bytes(merged):
    folder, _ = merged
    done = run(
        "mergekit-neuron", "merge", "merge.yaml", "again", "--quiet", "-j", "1", folder=folder, PYTHONHASHSEED="2"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in ("model.safetensors", "config.json", "mergekit_config.yml"):
        assert (folder / "again" / name).read_bytes() == (folder / "nested" / "out" / name).read_bytes()
    first, second = ((folder / out / "README.md").read_text() for out in ("nested/out", "again"))
    assert first.replace("# out", "# again") == second


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-multi"])
def test_mergekits_own_commands_give_the_same_bytes(merged, command, tmp_path):
    folder, _ = merged
    expected = (folder / "nested" / "out" / "model.safetensors").read_bytes()
    if command == "mergekit-yaml":
        done = run(command, "merge.yaml", tmp_path / "out", folder=folder)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
        assert (tmp_path / "out" / "README.md").exists()
        return
    stages = [
        {"name": "stage", **yaml.safe_load(configuration(dtype="bfloat16"))},
        {
            "merge_method": "neuro_merging",
            "base_model": "base",
            "models": [{"model": "stage"}],
            "parameters": {"density": 0.5},
        },
    ]
    (folder / "multi.yaml").write_text(yaml.safe_dump_all(stages))
    arguments = ("multi.yaml", "--out-path", tmp_path / "final", "-I", "stages")
    done = run(command, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "stages" / "stage" / "model.safetensors").read_bytes() == expected
    final, stage, base = read(tmp_path / "final"), read(folder / "stages" / "stage"), read(folder / "base")
    assert final.keys() == stage.keys()
    assert not same(final, stage)
    assert not same(final, base)


def test_mergekit_pytorch_knows_the_method(merged, tmp_path):
    folder, _ = merged
    files = {name: {"model": f"{name}/model.safetensors"} for name in ("base", *EXPERTS)}
    source = configuration(
        base_model=files["base"]["model"], models=[files[name] for name in EXPERTS], dtype="bfloat16"
    )
    (folder / "files.yaml").write_text(source)
    done = run("mergekit-pytorch", "files.yaml", tmp_path / "out", folder=folder)
    assert done.returncode == 0, done.stderr
    for name, tensor in read(folder / "nested" / "out").items():
        torch.testing.assert_close(read(tmp_path / "out")[name], tensor, atol=0, rtol=2**-7, msg=name)


# --- processes that meet with an accident

GUARDED = """
    import socket, sys

    asked = []

    def refuse(*args, **_):
        asked.append(args)
        raise OSError("the network is unreachable")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse

    from neuron_methods.cli import main

    def merge(*args):
        try:
            main(["merge", *args, "--quiet"], prog_name="mergekit-neuron")
        except SystemExit as leaving:
            return leaving.code

    assert merge("local.yaml", "out/one") == 0
    assert asked == [], asked

    from huggingface_hub.utils import _http
    _http.time.sleep = lambda seconds: None  # between its tries
    assert merge("hub.yaml", "two") == 1
    assert asked
"""


def test_no_network_is_asked_about_what_is_here(checkpoints, tmp_path):
    """Without HF_HUB_OFFLINE, and with the network unreachable; relative paths look like names of repositories."""
    shutil.copytree(checkpoints("llama-tied"), tmp_path / "models")
    local = configuration(folder="models", tokenizer=None)
    (tmp_path / "local.yaml").write_text(local)
    (tmp_path / "hub.yaml").write_text(configuration(folder="models", models=[{"model": "models/expert-z"}]))
    done = subprocess.run(
        [sys.executable, "-c", dedent(GUARDED)],
        cwd=tmp_path,
        env=environment(HF_HUB_OFFLINE="0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: model models/expert-z: no such directory here (check the path), and the Hub cannot be asked"
    )
    assert sorted(os.listdir(tmp_path)) == ["hub.yaml", "local.yaml", "models", "out"]


PAUSING = """
    import sys, time
    from mergekit.io.tensor_writer import TensorWriter
    from neuron_methods.cli import main

    save, saved = TensorWriter.save_tensor, []

    def pause(self, name, tensor, clone=False):
        save(self, name, tensor, clone)
        saved.append(name)
        if len(saved) == 5:
            print("merging", flush=True)
            time.sleep(60)

    TensorWriter.save_tensor = pause
    main(["merge", "merge.yaml", "parent/out", "--force", "--out-shard-size", "3K"], prog_name="mergekit-neuron")
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_leaves_what_was_there(checkpoints, tmp_path, name, code):
    folder = tmp_path / "work"
    shutil.copytree(checkpoints("llama-tied"), folder)
    (folder / "merge.yaml").write_text(configuration())
    old = name == "SIGTERM"  # once over an old output, once where there is none
    if old:
        (folder / "parent" / "out").mkdir(parents=True)
        (folder / "parent" / "out" / "config.json").write_text("old")
    with subprocess.Popen(
        [sys.executable, "-c", dedent(PAUSING)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "merging\n"
        (staging,) = (folder / "parent").glob(".out.*.partial")
        assert list(staging.glob("*.safetensors"))
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert sorted(os.listdir(folder)) == sorted(["base", *EXPERTS, "merge.yaml", *["parent"] * old])
    if old:
        assert os.listdir(folder / "parent") == ["out"]
        assert (folder / "parent" / "out" / "config.json").read_text() == "old"


def test_a_full_disk_leaves_what_was_there(checkpoints, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(checkpoints("llama-tied"), folder)
    (folder / "merge.yaml").write_text(configuration())
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("old")
    done = run(
        "mergekit-neuron",
        "merge",
        "merge.yaml",
        "out",
        "--force",
        "--quiet",
        folder=folder,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 1
    assert done.stderr == "error: out: no space left on the disk, or for a file (18.2 kB to write)\n"
    assert sorted(os.listdir(folder)) == ["base", *EXPERTS, "merge.yaml", "out"]
    assert (folder / "out" / "config.json").read_text() == "old"


def test_debug_shows_the_traceback_before_the_line(checkpoints, tmp_path):
    (tmp_path / "merge.yaml").write_text(configuration(folder=checkpoints("llama-tied"), parameters={"density": 2}))
    done = run("mergekit-neuron", "merge", "merge.yaml", "out", "--debug", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == ("error: merge.yaml: parameters: density must be a number in (0, 1]; got 2")
    assert os.listdir(tmp_path) == ["merge.yaml"]


# --- errors: one line, exit code 1, nothing left behind


def spoil(path, value):
    edit(path, lambda tensors: tensors[UP].__setitem__((0, 0), value))


ACCIDENTS = {
    "a model that is not there": (
        "llama-tied",
        lambda folder: shutil.rmtree(folder / "expert-a"),
        "error: model expert-a: no such directory here",
    ),
    "a directory without weights": (
        "llama-tied",
        lambda folder: os.remove(folder / "expert-a" / "model.safetensors"),
        "error: model expert-a: no weights in it",
    ),
    "a directory without config": (
        "llama-tied",
        lambda folder: os.remove(folder / "base" / "config.json"),
        "error: model base: the directory has no config.json",
    ),
    "a truncated file": (
        "llama-tied",
        lambda folder: os.truncate(folder / "expert-a" / "model.safetensors", 5000),
        "error: expert-a/model.safetensors: not a complete safetensors file",
    ),
    "a missing tensor": (
        "llama-tied",
        lambda folder: edit(folder / "expert-b", lambda tensors: tensors.pop(UP)),
        f"error: expert-b: tensor {UP} is missing from its checkpoint",
    ),
    "another shape": (
        "llama-tied",
        lambda folder: edit(folder / "expert-b", lambda tensors: tensors.update({UP: torch.zeros(3, 16)})),
        f"error: {UP}: shapes differ: expert-b has [3, 16], base has [24, 16]",
    ),
    "another vocabulary": (
        "llama-tied",
        lambda folder: save(fine_tune(build("llama-tied", vocab_size=48), 1), folder / "expert-b"),
        "align them in the YAML with tokenizer: {source: base}",
    ),
    "another number of layers": (
        "llama-tied",
        lambda folder: save(build("llama-tied", num_hidden_layers=1), folder / "expert-b"),
        "the models contribute different numbers of layers",
    ),
    "a bias that the base has alone": (
        "llama-tied",
        lambda folder: save(build("llama-tied", attention_bias=True), folder / "base"),
        "error: expert-a: its layers lack model.layers.{i}.self_attn.q_proj.bias, which those of base have",
    ),
    "another architecture": (
        "llama-tied",
        lambda folder: save(build("vit"), folder / "expert-b"),
        "error: the models are of different architectures",
    ),
    "another feed-forward": (
        "t5-gated",
        lambda folder: save(build("t5-ungated"), folder / "expert-b"),
        "error: expert-b: its layers have encoder.block.{i}.layer.{i}.DenseReluDense.wi.weight",
    ),
    "other classes": (
        "vit",
        lambda folder: save(build("vit", num_labels=7), folder / "expert-b"),
        "error: classifier.weight: shapes differ",
    ),
    "NaN in the base": (
        "llama-tied",
        lambda folder: spoil(folder / "base", float("nan")),
        f"error: {UP}: the base model holds NaN or Inf",
    ),
    "Inf in an expert": (
        "llama-tied",
        lambda folder: spoil(folder / "expert-b", float("inf")),
        f"error: {UP}: expert-b holds NaN or Inf",
    ),
    "a tensor that no method would merge": (
        "llama-tied",
        lambda folder: [edit(folder / m, lambda t: t.update(odd=torch.rand(3))) for m in ("base", "expert-a")],
        "error: expert-a: tensor odd differs from that of base",
    ),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_an_accident_is_told_in_one_line(workspace, monkeypatch, accident):
    family, happen, message = ACCIDENTS[accident]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = workspace(family)
    happen(folder)
    assert message in refused("--quiet")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_accidents_under_mergekits_methods(workspace, method):
    folder = workspace("llama-tied")
    spoil(folder / "expert-b", float("nan"))
    parameters = {"weight": 0.5, "density": 0.5} if method == "ties" else {}
    assert f"error: {UP}: NaN or Inf in expert-b" in refused("--quiet", method=method, parameters=parameters)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--device", "nonsense"], 1, "error: --device nonsense: no such kind of device"),
        (["--device", "cuda:99"], 1, "error: --device cuda:99: not available here"),
        (["--device", "meta"], 1, "error: --device meta: not available here"),
        (["--out-shard-size", "many"], 2, "Invalid value for '--out-shard-size': 'many' is no size"),
        (["--out-shard-size", ""], 2, "Invalid value for '--out-shard-size'"),
        (["-j", "0"], 2, "Invalid value for '--num-threads' / '-j'"),
        (["--random-seed", "x"], 2, "Invalid value for '--random-seed'"),
        (["--frobnicate"], 2, "No such option"),
        (["second-out"], 2, "unexpected extra argument"),
        (["--profile-out", "none/profile.json"], 1, "error: --profile-out none/profile.json: its directory is missing"),
    ],
)
def test_wrong_options(workspace, options, code, message):
    workspace("llama-tied")
    assert message in refused("--quiet", *options, code=code)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.yaml", "out"], 1, "error: none.yaml: cannot be read (No such file or directory)"),
        (["base/model.safetensors", "out"], 1, "error: base/model.safetensors: cannot be read"),
        (["base", "out"], 2, "'base' is a directory"),
        ([], 2, "Missing argument 'CONFIG'"),
        (["merge.yaml"], 2, "Missing argument 'OUT'"),
        (["merge.yaml", "base"], 1, "error: base: exists already"),
        (["merge.yaml", "base", "--force"], 1, "error: base: is or holds base, which is read"),
        (["merge.yaml", "merge.yaml", "--force"], 1, "error: merge.yaml: exists and is not a directory"),
        (["merge.yaml", "merge.yaml/out"], 1, "cannot write here"),
    ],
)
def test_wrong_arguments(workspace, arguments, code, message):
    workspace("llama-tied")
    Path("merge.yaml").write_text(configuration())
    before = sorted(os.listdir())
    result = CliRunner().invoke(main, ["merge", *arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert code == 2 or len(result.stderr.splitlines()) == 1
    assert sorted(os.listdir()) == before


# --- options


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
    result = invoke("plain", "--quiet")
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
