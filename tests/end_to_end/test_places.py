"""Where models may be: in directories of any name, in the Hub's cache without a network, by every command."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from neuron_methods.plugin.patches import register
from tests.sharing.hub_standin import Repository, hub, user
from tests.support.checkpoints import read
from tests.support.commands import begun, run
from tests.support.hub_cache import asked, cache, watched
from tests.support.merges import merge, same
from tests.support.routed import save_adapter
from tests.support.tiny import save_experts, write_texts


def wrote(folder, content, name="merge.yaml"):
    (folder / name).write_text(yaml.safe_dump(content))


def of_models(base, *models, method="task_arithmetic", **keys):
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": method, "base_model": str(base), "models": entries, "dtype": "float32", **keys}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A folder with base, expert-a, expert-b and an adapter on the base."""
    folder = save_experts(tmp_path_factory.mktemp("experts"))
    save_adapter(folder / "base", "llama", folder / "lora", 3)
    return folder


NAMES = {"base": "my base", "expert-a": 'the "best" expert', "lora": "it's an adapter"}


def by_ours(_content):
    done = run("mergekit-neuron", "merge", "merge.yaml", "out", folder=Path.cwd())
    assert (done.returncode, "rror" in done.stderr) == (0, False), done.stderr


def by_mergekit(content):
    """As other programs call it, without the YAML's text: then mergekit writes one at the very end."""
    register()
    run_merge(MergeConfiguration.model_validate(content), "out", MergeOptions(quiet=True))


@pytest.mark.parametrize("by", [by_ours, by_mergekit])
def test_a_path_may_hold_spaces_and_quotes(experts, tmp_path, monkeypatch, by):
    plain = of_models(experts / "base", experts / "expert-a", f"{experts / 'base'}+{experts / 'lora'}")
    merge(yaml.safe_dump(plain), tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    for name, other in NAMES.items():
        Path(other).symlink_to(experts / name)
    base, expert, lora = NAMES.values()
    content = of_models(base, expert, f"{base}+{lora}")
    wrote(tmp_path, content)
    by(content)
    assert same(read(Path("out")), read(Path("plain")))
    assert expert in Path("out/README.md").read_text()
    written = yaml.safe_load(Path("out/mergekit_config.yml").read_text())
    models = MergeConfiguration.model_validate(written).referenced_models()
    assert list(map(str, models)) == [base, expert, f"{base}+{lora}"]


COMPANIONS = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "spiece.model": "a model of pieces",
    "source.spm": "another",
    "merges.txt": "a b",
    "bpe.codes": "a b 1",
    "qwen.tiktoken": "YQ== 0",
    "generation_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "modules.json": "[]",
    "1_Pooling/config.json": "{}",
    "2_Dense/model.safetensors": "weights of a module",
}
OTHERS = (
    "README.md",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.pt",
    "modeling_own.py",
    "logs.txt",
    "a.json",
)


def with_companions(folder, experts):
    """A copy of the base with files of every kind beside the weights."""
    shutil.copytree(experts / "base", folder)
    for name, text in {**COMPANIONS, **dict.fromkeys(OTHERS, "{}")}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def went_along(out):
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not files & {*OTHERS} - {"README.md"}
    return {name: (out / name).read_text() for name in files & COMPANIONS.keys()}


@pytest.fixture(scope="module")
def ways_out(tmp_path_factory):
    """A folder with the Hub's `home`, and the variables of processes whose ways out are watched there."""
    folder = tmp_path_factory.mktemp("watched")
    environment = watched(folder, folder / "home")
    with begun(**environment), begun(**{**environment, "HF_HUB_OFFLINE": "0"}):
        yield folder, environment


@pytest.fixture
def guard(ways_out):
    """The same, with an empty cache, and nothing asked yet."""
    folder, environment = ways_out
    shutil.rmtree(folder / "home", ignore_errors=True)
    watched(folder, folder / "home")
    return folder, environment


@pytest.mark.parametrize("by", ["path", "cache", "download"])
def test_all_that_belongs_to_a_model_goes_with_it(experts, guard, tmp_path, by):
    base, place = with_companions(tmp_path / "base", experts), "base"
    watch, environment = guard
    with hub() as standin:
        if by == "cache":
            place = "org/base"
            cache(watch / "home", place, base)
        elif by == "download":
            place, token = "org/base", "hf_token"
            standin.users[token] = user("alice")
            files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
            standin.repositories[place] = Repository(branches={"main": {k: (v, False) for k, v in files.items()}})
            environment = {"HF_HOME": str(watch / "home"), "HF_ENDPOINT": standin.url, "HF_TOKEN": token}
            environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        wrote(tmp_path, of_models(place, experts / "expert-a"))
        done = run("mergekit-neuron", "merge", "merge.yaml", "out", folder=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
    assert asked(watch) == []
    assert went_along(tmp_path / "out") == COMPANIONS
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    downloaded = {path.name for path in (watch / "home").rglob("snapshots/*/*")}
    assert by == "cache" or not downloaded & {*OTHERS}


@pytest.fixture
def filled(experts, guard, tmp_path):
    """The same, with all models of `experts` in the cache, the adapter's base named by its id."""
    home = guard[0] / "home"
    shutil.copytree(experts / "lora", tmp_path / "lora")
    content = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({**content, "base_model_name_or_path": "org/base"})
    )
    for name in ("base", "expert-a"):
        cache(home, f"org/{name}", experts / name)
    cache(home, "org/lora", tmp_path / "lora")
    return guard


@pytest.mark.parametrize(
    ("command", "offline"),
    [(("mergekit-neuron", "merge"), "1"), (("mergekit-neuron", "merge"), "0"), (("mergekit-yaml",), "1")],
)
def test_what_is_in_the_cache_is_merged_without_a_network(experts, filled, tmp_path, command, offline):
    by_path = of_models(experts / "base", experts / "expert-a", f"{experts / 'base'}+{experts / 'lora'}")
    merge(yaml.safe_dump(by_path), tmp_path / "plain")
    watch, environment = filled
    environment = {**environment, "HF_HUB_OFFLINE": offline}
    wrote(tmp_path, of_models("org/base", "org/expert-a", "org/lora"))
    done = run(*command, "merge.yaml", "out", folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert same(read(tmp_path / "out"), read(tmp_path / "plain"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (experts / "base" / "tokenizer.json").read_bytes()
    assert len(asked(watch)) == (0 if offline == "1" else 1)


def test_what_is_in_the_cache_is_measured_without_a_network(filled, tmp_path):
    write_texts(tmp_path / "texts.jsonl", 8)
    watch, environment = filled
    environment = {**environment, "HF_HUB_OFFLINE": "0"}
    data = ("--data", "a=texts.jsonl:text", "-o", "profile.safetensors")
    done = run("mergekit-neuron", "profile", "org/lora", *data, folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert len(asked(watch)) == 1


def test_an_adapter_is_verified_against_a_base_in_the_cache(filled, tmp_path):
    watch, environment = filled
    done = run("mergekit-neuron", "verify", "lora", folder=tmp_path, **environment)
    assert (done.returncode, "complete by peft" in done.stdout) == (0, True), done.stderr
    assert asked(watch) == []


@pytest.mark.parametrize(("command", "offline"), [("merge", "1"), ("merge", "0"), ("profile", "0"), ("evaluate", "0")])
def test_what_is_not_in_the_cache_is_refused_in_one_line(filled, tmp_path, command, offline):
    write_texts(tmp_path / "texts.jsonl", 8)
    wrote(tmp_path, {"tasks": [{"name": "p", "kind": "perplexity", "data": "texts.jsonl"}]}, "tasks.yml")
    wrote(tmp_path, of_models("org/base", "org/none"))
    arguments = {
        "merge": ("merge.yaml", "out"),
        "profile": ("org/none", "--data", "a=texts.jsonl:text", "-o", "out.safetensors"),
        "evaluate": ("org/none", "--task", "tasks.yml"),
    }
    watch, environment = filled
    environment = {**environment, "HF_HUB_OFFLINE": offline}
    done = run("mergekit-neuron", command, *arguments[command], folder=tmp_path, **environment)
    assert done.returncode == 1
    *before, line = done.stderr.splitlines()
    assert line.startswith("error: model org/none: ")
    assert "unexpected" not in line
    if offline == "1":
        assert (before, asked(watch)) == ([], [])
    else:
        assert len(asked(watch)) == 1
        (warning,) = before
        assert "https://huggingface.co does not answer" in warning


def test_a_link_that_leads_out_of_a_model_is_not_followed(experts, tmp_path):
    base = with_companions(tmp_path / "base", experts)
    (tmp_path / "secret").write_text("{}")
    (base / "generation_config.json").unlink()
    (base / "generation_config.json").symlink_to("../secret")
    wrote(tmp_path, of_models("base", experts / "expert-a"))
    done = run("mergekit-neuron", "merge", "merge.yaml", "out", folder=tmp_path)
    assert done.returncode == 1
    assert "model base: base/generation_config.json: a link that leads out of base" in done.stderr
    assert not (tmp_path / "out").exists()
