"""Every command of the README, run as the reader would run it; the demo with short training.

What installs is run by `.ci/run`, which takes its installation from the README; here the rest of each line runs, in an
empty directory, with the Hub out of reach.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mergekit.merge_methods import registry
from transformers import AutoModelForCausalLM, AutoTokenizer

import neuron_methods

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return [block.strip() for block in re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)]


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
SHORT = " --steps 2 --examples 4"
SEARCH = ("lambda_orthogonal=0.5:4:0.5 --test", "lambda_orthogonal=1,2 --only german")  # as shown, as run here
ROUTING = ("mergekit-neuron route ", "mergekit-neuron generate ")
# The routed model's YAML as shown, and what is added to make it quick: few samples, experts as they are.
(ROUTED,) = re.findall(r"^```\n(base_model: .*?)^```", README, re.M | re.S)
QUICK = "enhancement: {enabled: false}\nrouter: {samples: 16, epochs: 20}\n"
OURS = ("neuro_merging", "min_merging", "neuron_merge")
DEMO, TESTS = (next(c for c in COMMANDS if part in c and "pip" in c) for part in ("mergekit-neuron demo", "-m pytest"))


def run(command, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A directory in which the README's demo has run, its experts trained for two steps only."""
    directory = tmp_path_factory.mktemp("readme")
    done = run(DEMO.rpartition("&& ")[2] + SHORT, directory)
    return directory, done.stdout


@pytest.fixture(scope="module")
def routed(demo):
    """The same directory, with the routed model of the README."""
    directory, _ = demo
    (directory / "routed.yaml").write_text(ROUTED[: ROUTED.index("router:")] + QUICK)
    (command,) = [command for command in COMMANDS if command.startswith(ROUTING[0])]
    run(command, directory)
    return directory


def test_the_two_commands_install_the_tested_versions():
    for command in (DEMO, TESTS):
        assert command.startswith("pip install torch==2.13.0 && pip install -c .ci/constraints.txt ")
    assert "torch==2.13.0" in (ROOT / ".ci/constraints.txt").read_text()


def test_demo_shows_every_model_on_every_task(demo):
    _, output = demo
    names = [line.split()[0] for line in output.splitlines() if line.count("%") == 4]
    assert names == ["base", "expert-arithmetic", "expert-german", "expert-python", "merge"]


def test_merging_commands_run_on_what_the_demo_wrote(demo):
    directory, _ = demo
    for command in COMMANDS:
        if command not in (DEMO, TESTS) and not command.startswith(ROUTING):
            short = command + SHORT if command.startswith("mergekit-neuron demo") else command.replace(*SEARCH)
            run(short, directory)
    weights = {name: (directory / name / "model.safetensors").read_bytes() for name in ("merged", "merged-by-mergekit")}
    assert weights["merged"] == weights["merged-by-mergekit"]


def test_merge_loads_with_plain_transformers_and_answers(demo):
    merged = demo[0] / "mergekit-neuron-demo" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])
    assert "Paris" in answer


def test_yaml_examples_merge(demo):
    directory, _ = demo
    assert blocks("yaml")
    for number, text in enumerate(blocks("yaml")):
        (directory / f"readme-{number}.yaml").write_text(text)
        run(f"mergekit-neuron merge readme-{number}.yaml ./readme-{number}", directory)
        assert (directory / f"readme-{number}" / "model.safetensors").is_file()


def test_python_examples_run(routed):
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=routed, check=True)


def test_routed_model_answers_and_tells_its_routing(routed):
    (command,) = [command for command in COMMANDS if command.startswith(ROUTING[1])]
    output = run(command, routed).stdout
    assert output.count("  routing: ") == command.count("--prompt")


def test_tables_list_the_parameters_with_their_defaults():
    neuron_methods.register()
    for name in OURS:
        section = README.split(f"### `{name}`\n")[1].split("\n## ")[0].split("\n### ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (expert|shared) \| `?([^|`]*?)`? \|", section, re.M)
        documented = {parameter: (scope, default.strip()) for parameter, scope, default in rows}
        parameters = registry.get(name).spec.parameters
        assert set(documented) == {parameter.name for parameter in parameters}
        for parameter in parameters:
            scope = "shared" if parameter.scope.value == "shared" else "expert"
            assert documented[parameter.name] == (scope, str(parameter.default) or "–"), parameter.name


def test_every_method_of_ours_has_a_yaml_example():
    neuron_methods.register()
    ours = {m.spec.name for m in registry.registered_methods() if type(m).__module__.startswith("neuron_methods")}
    assert ours == set(OURS) == {yaml.safe_load(text)["merge_method"] for text in blocks("yaml")}
