"""What the README and the documents that it leads to say: every command, YAML, default, figure of a table and link.

Commands of `sh` blocks are run as the reader would run them, in an empty directory, with the Hub out of reach, after a
demo of short training that has a corner of SmolLM2 for its base; `test_demo.py` runs the demo on all of it. What
installs is run by `.ci/run`, which takes its installation from the README. The scripts under examples take minutes, and
what is in `text` blocks needs the Hub or a second process: their arguments are read by the program itself, which stops
there.
"""

import json
import re
import shlex
import subprocess
from itertools import chain
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mergekit.merge_methods import registry
from safetensors.torch import load_file

import neuron_methods
from neuron_methods.cli import main
from neuron_methods.evaluation import load_tasks
from neuron_methods.routing.route_yaml import RouterSettings
from tests.support import commands
from tests.support.small_smollm2 import save_small_package

ROOT = Path(__file__).parents[2]
README, RECIPES, LEADERBOARD = ROOT / "README.md", ROOT / "recipes/README.md", ROOT / "examples/leaderboard/README.md"
DOCUMENTS = {
    path: path.read_text(encoding="utf-8")
    for path in (README, RECIPES, *sorted(ROOT.glob("examples/*/README.md")), ROOT / "CONTRIBUTING.md")
}
README_BYTES = 10_000


def fences(text):
    """(language, content) of every fenced block."""
    return [
        (language, content.strip()) for language, content in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.M | re.S)
    ]


def blocks(language):
    """Every block of a language in all documents, what two documents show alike once."""
    found = chain.from_iterable(fences(text) for text in DOCUMENTS.values())
    return list(dict.fromkeys(content for own, content in found if own == language))


def lines(language):
    return list(dict.fromkeys(line for block in blocks(language) for line in block.splitlines()))


def yamls(key):
    """Every YAML block with a key at its top."""
    return [text for text in blocks("yaml") if key in yaml.safe_load(text)]


COMMANDS = lines("sh")
SHORT = " --steps 2 --examples 4"
SEARCH = ("lambda=0.8:1.2:0.1 --test", "lambda=0.9,1.1 --only german")  # as shown, as run here
FEW = (r"--samples \d+", "--samples 4")  # of what the reader measures inputs on
# Run in this process; each is run in one of its own elsewhere.
IN_PROCESS = tuple(f"mergekit-neuron {name}" for name in ("demo", "describe", "groups"))
ROUTING = ("mergekit-neuron route ", "mergekit-neuron generate ")
SCRIPTS = "python examples/"
# What is added to the routed model's YAML to make it quick: few samples, experts as they are.
QUICK = "enhancement: {enabled: false}\nrouter: {samples: 16, epochs: 20}\n"
OURS = ("neuro_merging", "min_merging", "neuron_merge", "neuron_response")
DEMO, TESTS = (next(c for c in COMMANDS if part in c and "pip" in c) for part in ("mergekit-neuron demo", "-m pytest"))
# Runs scripts as far as their argument parsers, one [script, argument, ...] after the other.
PARSE = """
import argparse, json, pathlib, runpy, sys
class Parsed(Exception): pass
parse = argparse.ArgumentParser.parse_args
def stop(self, *arguments):
    parse(self, *arguments)
    raise Parsed
argparse.ArgumentParser.parse_args = stop
for command in json.loads(sys.argv[1]):
    known, folder = set(sys.modules), str(pathlib.Path(command[0]).resolve().parent)
    sys.argv[:] = command
    sys.path.insert(0, folder)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Parsed:
        print(*command)
    sys.path.remove(folder)
    for name in set(sys.modules) - known:  # scripts in two folders call their neighbours alike
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]
"""


def checked(done, command):
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def run(command, directory):
    """A line of a document, in a process of its own."""
    return checked(commands.run(*shlex.split(command), folder=directory), command)


def invoke(command, directory):
    """A line of a document, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.stdout


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """Let the demo take a corner of SmolLM2 for the whole."""
    folder = tmp_path_factory.mktemp("package")
    save_small_package(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def demo(small_base, tmp_path_factory):
    """A directory in which the README's demo has run, its experts trained for two steps only, and what it printed."""
    directory = tmp_path_factory.mktemp("readme")
    return directory, invoke(DEMO.rpartition("&& ")[2] + SHORT, directory)


@pytest.fixture(scope="module")
def routed(demo):
    """The same directory, with the documents' routed model."""
    directory, _ = demo
    (shown,) = yamls("experts")
    (directory / "routed.yaml").write_text(shown[: shown.index("router:")] + QUICK)
    commands = [command for command in COMMANDS if command.startswith(ROUTING[0])]
    assert [command.endswith(" --static") for command in commands] == [False, True]
    for command in commands:
        run(command, directory)
    return directory


def test_the_readme_is_read_in_two_minutes():
    assert README.stat().st_size <= README_BYTES


def test_every_block_is_of_a_kind_that_is_looked_at():
    found = {language for text in DOCUMENTS.values() for language, _ in fences(text)}
    assert found == {"sh", "yaml", "python", "text"}
    assert sum(map(len, map(yamls, ("merge_method", "experts", "tasks")))) == len(blocks("yaml"))


def test_the_two_commands_install_the_tested_versions():
    for command in (DEMO, TESTS):
        assert command.startswith("pip install torch==2.13.0 && pip install -c .ci/constraints.txt ")
    assert "torch==2.13.0" in (ROOT / ".ci/constraints.txt").read_text()


def test_demo_shows_every_model_on_every_task(demo):
    _, output = demo
    names = [line.split()[0] for line in output.splitlines() if re.search(r"  (–|[\d.]+ \([\d.]+–[\d.]+\))$", line)]
    assert names == ["base", "expert-arithmetic", "expert-german", "expert-python", "merge"]


def test_merging_commands_run_on_what_the_demo_wrote(demo):
    directory, _ = demo
    for command in COMMANDS:
        if command not in (DEMO, TESTS) and not command.startswith((*ROUTING, SCRIPTS)):
            if command.startswith(IN_PROCESS):
                invoke(command + SHORT * command.startswith("mergekit-neuron demo"), directory)
                continue
            short = command.replace(*SEARCH)
            run(re.sub(*FEW, short) if "--inputs" in short else short, directory)
    ours, mergekits = (load_file(directory / name / "model.safetensors") for name in ("merged", "merged-by-mergekit"))
    assert ours.keys() == mergekits.keys() and all(ours[name].equal(mergekits[name]) for name in ours)
    assert {tensor.dtype for tensor in ours.values()} == {tensor.dtype for tensor in mergekits.values()}


def test_scripts_take_the_arguments_that_are_shown(tmp_path):
    shown = [shlex.split(command.removeprefix("python ")) for command in COMMANDS if command.startswith(SCRIPTS)]
    folders = {Path(command[0]).parent.name for command in shown}
    assert folders == {"zoo", "leaderboard", "figures", "routing", "benchmarks"}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "parse.py").write_text(PARSE)
    done = run(shlex.join([str(tmp_path / "parse.py"), json.dumps(shown)]), tmp_path)
    assert done.stdout.splitlines() == [" ".join(command) for command in shown]


def test_commands_that_need_the_hub_or_more_processes_are_understood(demo, monkeypatch):
    monkeypatch.chdir(demo[0])
    for line in lines("text"):
        words = shlex.split(line)
        if words[:3] == ["accelerate", "launch", "-m"]:
            words = ["mergekit-neuron", *words[4:]]
        if words[0] == "mergekit-neuron":
            command = main.get_command(None, words[1])
            assert command.make_context(words[1], words[2:]).params
        else:
            shown = subprocess.run([commands.SCRIPTS / words[0], *words[1:], "--help"], capture_output=True, text=True)
            checked(shown, line)


def test_yaml_examples_merge(demo):
    directory, _ = demo
    different = {json.dumps(yaml.safe_load(text), sort_keys=True): text for text in yamls("merge_method")}
    assert different
    for number, text in enumerate(different.values()):
        (directory / f"readme-{number}.yaml").write_text(text)
        invoke(f"mergekit-neuron merge readme-{number}.yaml ./readme-{number}", directory)
        assert (directory / f"readme-{number}" / "model.safetensors").is_file()


def test_tasks_are_those_that_the_demo_leaves(demo):
    folder = demo[0] / "mergekit-neuron-demo"
    (shown,) = yamls("tasks")
    (folder / "shown.yml").write_text(shown)
    written = {task.name: task for task in load_tasks(folder / "tasks.yml")}
    for task in load_tasks(folder / "shown.yml"):
        same = written[task.name]
        assert (task.kind, task.columns, task.settings) == (same.kind, same.columns, same.settings)
        assert task.test.location == same.test.location
    from neuron_methods.evaluation.kinds import KINDS

    listed = DOCUMENTS[RECIPES].partition("\nKinds: ")[2].partition("\n\n")[0].partition(" for a task")[0]
    assert set(re.findall(r"`([a-z-]+)`", listed)) == set(KINDS)


def test_python_examples_run(routed):
    for number, block in enumerate(blocks("python")):
        (routed / f"example-{number}.py").write_text(block)
        run(str(routed / f"example-{number}.py"), routed)


def test_routed_model_answers_and_tells_its_routing(routed):
    (command,) = [command for command in COMMANDS if command.startswith(ROUTING[1])]
    output = run(command, routed).stdout
    assert output.count("  routing: ") == command.count("--prompt")


def test_tables_list_the_parameters_with_their_defaults():
    neuron_methods.register()
    for name in OURS:
        section = DOCUMENTS[RECIPES].split(f"### `{name}`\n")[1].split("\n## ")[0].split("\n### ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (expert|shared) \| `?([^|`]*?)`? \|", section, re.M)
        documented = {parameter: (scope, default.strip()) for parameter, scope, default in rows}
        parameters = registry.get(name).spec.parameters
        assert set(documented) == {parameter.name for parameter in parameters}
        for parameter in parameters:
            scope = "shared" if parameter.scope.value == "shared" else "expert"
            assert documented[parameter.name] == (scope, str(parameter.default) or "–"), parameter.name


def test_defaults_told_in_sentences():
    neuron_methods.register()
    own = {parameter.name: parameter.default for parameter in registry.get("neuro_merging").spec.parameters}
    benchmarks = " ".join(DOCUMENTS[ROOT / "examples/benchmarks/README.md"].split())
    assert f"its defaults (density {own['density']}, automatic λ₂)" in benchmarks
    assert own["lambda_orthogonal"] == "auto"
    routing = " ".join(DOCUMENTS[ROOT / "examples/routing/README.md"].split())
    assert f"(`{RouterSettings.model_fields['ood_score'].default}` is the default)" in routing


def test_every_method_of_ours_has_a_yaml_example():
    neuron_methods.register()
    ours = {m.spec.name for m in registry.registered_methods() if type(m).__module__.startswith("neuron_methods")}
    for document in (README, RECIPES):
        shown = [yaml.safe_load(text) for language, text in fences(DOCUMENTS[document]) if language == "yaml"]
        assert ours == set(OURS) == {content["merge_method"] for content in shown if "merge_method" in content}


def leaderboard_tables() -> dict[str, dict[str, tuple[str, str]]]:
    """Read results.md: {family: {row: (where it is from and its points, mean score)}}."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    heads: list[str] = []
    for line in (LEADERBOARD.parent / "results.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        if cells[:1] == ["method"]:
            heads = cells
        elif cells and not cells[0].startswith("---"):
            for head, cell in zip(heads[3:], cells[3:], strict=True):
                if head != "gain":
                    found.setdefault(head, {})[cells[0]] = (f"{cells[1]} {cells[2]}", cell.partition(" ")[0])
    return found


def test_the_leaderboards_show_the_measured_figures():
    measured = leaderboard_tables()
    families = ["ViT", "T5", "T5, token embeddings by mean", "ViT, LoRA", "T5, LoRA", "Llama, LoRA"]
    columns = [measured[family] for family in families]
    everyone = {tuple(column[name][1] for column in columns) for name in columns[0]}

    theirs = [[(w, s) for w, s in column.values() if "samples" not in w and s != "–"] for column in columns]
    bests = {
        tuple(max((s for w, s in column if w.startswith(origin)), key=float) for column in theirs)
        for origin in ("mergekit", "fusion-bench")
    }
    for document, count in ((README, 7), (LEADERBOARD, 34)):
        table = DOCUMENTS[document].partition("| ViT, 8 tasks |")[2].partition("\n\n")[0]
        rows = [[cell.strip(" *").split("; ") for cell in line.split("|")[-7:-1]] for line in table.splitlines()[2:]]
        shown = [point for row in rows for point in zip(*row, strict=True)]
        assert len(shown) == count
        assert set(shown) <= everyone | bests


def test_what_stands_beside_the_leaderboard_is_as_the_scripts_wrote_it():
    """Tables of the leaderboard's document after its first, and lists of comparisons, are lines of files beside it."""
    files = [path for path in LEADERBOARD.parent.glob("*.md") if path != LEADERBOARD]
    written = {line for path in files for line in path.read_text(encoding="utf-8").splitlines()}
    text = DOCUMENTS[LEADERBOARD]
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    compared = [line for line in text.splitlines() if re.match(r"- (ViT|T5|Llama)[^:]*: ", line)]
    assert len(tables) >= 4 and compared
    assert {line for table in tables[1:] for line in table} | set(compared) <= written


def test_figures_in_sentences_of_the_readme_are_those_of_the_tables():
    told = set(re.findall(r"(\d+\.\d+) (?:×|%|points)", " ".join(DOCUMENTS[README].split())))
    measured = {n for path, text in DOCUMENTS.items() if path != README for n in re.findall(r"\d+\.\d+", text)}
    assert told and told <= measured


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document):
    text = re.sub(r"^```.*?^```", "", DOCUMENTS[document], flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link
