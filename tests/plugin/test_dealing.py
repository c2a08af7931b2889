"""Several processes make one merge together, and it is to the last bit that of one."""

import json
import os
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mergekit.architecture import WeightInfo
from mergekit.merge_methods import registry
from mergekit.options import MergeOptions

from neuron_methods.models.team import Team
from neuron_methods.plugin.dealing import check_enough, check_same_plan, dealt
from neuron_methods.plugin.merging import MergeWitness, merge_to_directory, plan_merge
from neuron_methods.plugin.work import Work
from neuron_methods.support.errors import UserError
from neuron_methods.support.shares import largest_first
from tests.support import tiny, together
from tests.support.checkpoints import configuration, edit
from tests.support.commands import launched
from tests.support.merges import EXPERTS, UP
from tests.support.plans import write_groups
from tests.support.routed import save_adapter

OPTIONS = {"out_shard_size": 5000, "random_seed": 7, "write_model_card": True}
ADAPTERS = ("base+adapter-a", "base+adapter-b")
#: Methods that find something of a low rank in adapters.
OF_LOW_RANK = ("neuro_merging", "neuron_response", "neuron_merge", "task_arithmetic")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """As the processes that are started: transformers 5 writes into a tokenizer's config whether the Hub was asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def launched_on_two_hosts(*arguments, folder):
    """Have two launchers start one process each, as on two hosts that share a directory."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hosts = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    with ThreadPoolExecutor() as threads:
        started = [
            threads.submit(launched, *arguments, folder=folder, options=[*hosts, "--machine_rank", str(rank)])
            for rank in range(2)
        ]
    return [host.result() for host in started]


def recipe(method, experts=EXPERTS):
    """A YAML that any method takes, of models or of adapters."""
    own = {parameter.name: parameter for parameter in method.spec.parameters}
    parameters = {name: value for name, value in (("weight", 0.5), ("t", 0.4), ("density", 0.6)) if name in own}
    contract, models = method.spec.contract, [{"model": expert} for expert in experts]
    if contract.max_inputs is not None:
        models = models[: contract.max_inputs - (contract.base.value == "required")]
    content = {"merge_method": method.spec.name, "models": models, "parameters": parameters}
    if contract.base.value != "ignored":
        content["base_model"] = "base"
    if method.spec.name == "neuron_merge":
        parameters.update(groups="groups.json", within="neuro_merging", rest="dare_linear", rest_density=0.5)
        parameters.pop("density", None)
        for model, group in zip(models, ("math", "code"), strict=True):
            model["parameters"] = {"group": group}
    if method.spec.name == "min_merging":
        parameters["rest"] = "neuro_merging"
    return yaml.safe_dump(content)


def job(name, source, *, adapter=False, **more):
    return {"yaml": source, "name": name, "options": OPTIONS, "adapter": adapter, **more}


def merges():
    found = []
    for method in registry.registered_methods():
        name, without_base = method.spec.name, method.spec.contract.base.value == "ignored"
        found.append(job(name, recipe(method)))
        found.append(job(f"{name}-of-adapters", recipe(method, ADAPTERS)))
        # An adapter needs a base, which these methods are told by adapters alone.
        found.append(job(f"{name}-as-adapter", recipe(method, ADAPTERS if without_base else EXPERTS), adapter=True))
    found += [job(f"{m}-low-rank", recipe(registry.get(m), ADAPTERS), adapter=True) for m in OF_LOW_RANK]
    tensor = configuration(parameters={"trim": "tensor", "density": [0.1, 0.5]}, dtype="bfloat16")
    found.append(job("trim-tensor", tensor, profile_out="two/trim.json"))
    aligned = configuration("ties", parameters={"weight": 0.5}, tokenizer={"source": "union"})
    found.append(job("tokens", aligned))
    return found


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A folder where two processes have made all merges in turn, into two/NAME; and what they said."""
    folder = tiny.save_experts(tmp_path_factory.mktemp("together"))
    for seed, adapter in enumerate(ADAPTERS):
        save_adapter(folder / "base", "llama", folder / adapter.removeprefix("base+"), seed)
    write_groups(folder / "groups.json", tiny.config_of("llama")[1], ["general", "math", "code"])
    for name in ("elsewhere", "spoiled"):
        (folder / name).mkdir()
        for model in ("base", *EXPERTS):
            shutil.copytree(folder / model, folder / name / model)
    edit(folder / "spoiled" / "expert-b", lambda tensors: tensors[UP].mul_(2))
    source = configuration()
    jobs = [{**entry, "out": f"two/{entry['name']}"} for entry in merges()]
    jobs += [
        job("resumed", source, out="two/resumed", resume=True),
        job("unseen", source, out="two/unseen", other="elsewhere"),
        job("differing", source, out="two/differing", other="spoiled"),
        job("killed", source, out="two/killed", killed=1),
    ]
    (folder / "two").mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    here = os.getcwd()
    os.chdir(folder)
    try:
        with pytest.raises(KeyboardInterrupt):  # one process begins what two resume
            begin(job("resumed", source, out="two/resumed"))
        left = sorted(path.name for path in Path("two/.resumed.unfinished").iterdir())
        done = launched("tests.support.together", "jobs.json", folder=folder)
    finally:
        os.chdir(here)
    assert len(left) > 2
    return folder, done


def begin(entry, tensors=12):
    seen = []

    def on_tensor(name, *_):
        seen.append(name)
        if len(seen) == tensors:
            raise KeyboardInterrupt

    merge_to_directory(
        entry["yaml"],
        entry["out"],
        progress=False,
        options=MergeOptions(**entry["options"]),
        witness=MergeWitness(lambda *_: [], on_tensor=on_tensor),
    )


@pytest.fixture
def two(outcome, monkeypatch):
    monkeypatch.chdir(outcome[0])
    return outcome[1]


def test_two_processes_write_the_bytes_of_one(two):
    for entry in merges():
        out = f"one/{entry['name']}"
        together.merge({**entry, "out": out, "profile_out": entry.get("profile_out") and "one/trim.json"})
        assert everything(f"two/{entry['name']}") == everything(out), (entry["name"], two.stderr[-2000:])
    assert Path("two/trim.json").read_bytes() == Path("one/trim.json").read_bytes()


def test_two_processes_go_on_with_what_one_has_begun_and_one_with_that_of_two(two):
    entry = job("merge", configuration())
    together.merge({**entry, "out": "one/resumed"})
    assert everything("two/resumed") == everything("one/resumed")
    assert not Path("two/killed").exists()  # nothing that can be loaded
    kept = len(list(Path("two/.killed.unfinished").glob("*.safetensors")))
    assert kept
    together.merge({**entry, "out": "two/killed", "resume": True})
    together.merge({**entry, "out": "one/killed"})
    assert everything("two/killed") == everything("one/killed")
    assert not Path("two/.killed.unfinished").exists()


def test_what_is_wrong_is_told_once_and_names_the_process(two):
    said = [line for line in (two.stdout + two.stderr).splitlines() if line.startswith(("error: ", "refused "))]
    shared, same = "all hosts have to share the directory", "all need the same files, packages and options"
    assert [re.sub(r" on [\w.-]+", "", line) for line in said] == [
        f"refused two/unseen: two/unseen: process 1 does not see what process 0 writes there; {shared}",
        f"refused two/differing: process 1: expert-b/model.safetensors differs from that of process 0; {same}",
        "error: process 1 of 2 has died, so the others end, too",
    ]
    assert two.returncode != 0
    assert two.returncode != 0
    assert not Path("two/unseen").exists()
    assert not Path("two/differing").exists()


def test_the_installed_command_speaks_once_for_all_hosts(two, outcome):
    source = configuration("ties", parameters={"weight": 0.5})
    Path("merge.yml").write_text(source)
    options = ["--random-seed", "7", "--report"]
    merge = ["neuron_methods", "merge", "merge.yml", "three/out", *options]
    first, second = launched_on_two_hosts(*merge, folder=outcome[0])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:] + second.stderr[-2000:]
    assert re.fullmatch(r"ties: \d+ tensors, .* s\n(  .*\n)*", first.stdout)
    assert first.stderr.count("Merging tensors: 0 of") == 1
    assert not second.stdout and "tensors" not in second.stderr
    together.merge(job("merge", source, out="four/out", options={"random_seed": 7}, report=True))
    assert Path("four/out/report/report.html").exists()
    assert everything("three/out") == everything("four/out")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_tensor_is_dealt_once_and_tied_ones_together(outcome, count, monkeypatch):
    monkeypatch.chdir(outcome[0])
    plan = plan_merge(configuration())
    names = [weight.name for weight, _, _ in plan.tensors]
    work, finished = Work(Path("nowhere")), set(names[:2])
    work.groups = [names[start : start + 4] for start in range(0, len(names), 4)]
    dealt_to = []
    for rank in range(count):
        team = Team()
        team.rank, team.count = rank, count
        dealt_to.append(dealt(team, work, plan, finished))
    pieces = [piece for of_one in dealt_to for piece in of_one]
    assert sorted(name for piece in pieces for name in piece) == sorted(set(names) - finished)
    assert all(any({*piece} <= {*group} for group in work.groups) for piece in pieces)
    whole = [piece for piece in pieces if piece in work.groups]
    assert len(whole) >= (len(work.groups) - 1) // count * count - 1


def dealt_of_one_shard(count, sizes, tied=(), effort=None):
    """Which tensors each process gets of a plan whose output is one shard."""
    weights = [WeightInfo(name=n, tied_names=tuple({*tied} - {n}) if n in tied else None) for n in sizes]
    plan = SimpleNamespace(
        tensors=[(w, {"m": SimpleNamespace(bytes=3 * sizes[w.name])}, sizes[w.name]) for w in weights]
    )
    work, found = Work(Path("nowhere")), []
    work.groups = [list(sizes)]
    for rank in range(count):
        team = Team()
        team.rank, team.count = rank, count
        (pieces,) = dealt(team, work, plan, set(), *([effort] if effort else []))
        found.append(pieces)
    assert sorted(name for names in found for name in names) == sorted(sizes)
    return found


def test_one_shard_is_dealt_so_that_all_have_as_much_to_do():
    sizes = {
        f"model.layers.{n}.{part}.weight": size for n in range(8) for part, size in (("up", 30), ("q", 7), ("k", 2))
    }
    for count in (2, 3, 5):
        loads = [sum(sizes[name] for name in names) for names in dealt_of_one_shard(count, sizes)]
        assert max(loads) - min(loads) <= 7, loads
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    both, other = sorted(dealt_of_one_shard(2, {**sizes, **dict.fromkeys(tied, 150)}, tied), key=len)
    assert {*tied} <= {*both} and not {*tied} & {*other}


def test_what_takes_no_time_counts_for_little():
    sizes = {"embed": 100, **{f"matrix {n}": 10 for n in range(10)}}
    alone, others = dealt_of_one_shard(2, sizes)
    assert alone == ["embed"] and len(others) == 10
    quick, others = dealt_of_one_shard(2, sizes, effort=lambda name: 0.2 if name == "embed" else 1.0)
    assert "embed" in quick and (len(quick), len(others)) == (5, 6)


@pytest.mark.parametrize(
    ("processes", "tensors", "has"), [(4, 3, "3 tensors"), (2, 1, "1 tensor"), (2, 0, "0 tensors")]
)
def test_no_more_processes_than_tensors(processes, tensors, has):
    team, work = Team(), Work(Path("nowhere"))
    work.groups = [[f"t{number}"] for number in range(tensors)]
    team.count = max(tensors, 1)
    check_enough(team, work)
    team.count = processes
    with pytest.raises(UserError, match=rf"^--num_processes {processes}: the merge has {has}; give at most"):
        check_enough(team, work)


@pytest.mark.parametrize("what", ["the version of mergekit", "base/model.safetensors"])
def test_a_process_that_would_make_something_else_is_named(what, monkeypatch):
    team, own = Team(), {what: "1.0", "merge.yml": "same"}
    monkeypatch.setattr(team, "exchange", lambda mine: [mine, ("process 1 on there", {**mine[1], what: "2.0"})])
    line = rf"^process 1 on there: {what} differs from that of process 0 on \S+; all need the same files"
    with pytest.raises(UserError, match=line):
        check_same_plan(team, own)


def test_the_largest_come_first():
    assert largest_first([5, 1, 4, 3, 3], 2) == [[0, 4], [1, 2, 3]]
    assert largest_first([2, 2], 3, [0, 5, 1]) == [[0], [], [1]]
    assert largest_first([], 2) == [[], []]
