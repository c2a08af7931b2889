"""Where models may be: in directories of any name, in the Hub's cache without a network, by every command."""

import pytest
import yaml

from tests.support.checkpoints import read
from tests.support.commands import run
from tests.support.merges import same
from tests.support.routed import save_adapter
from tests.support.tiny import save_experts


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


@pytest.mark.parametrize("command", [("mergekit-neuron", "merge"), ("mergekit-yaml",)])
def test_a_path_may_hold_spaces_and_quotes(experts, tmp_path, command):
    wrote(tmp_path, of_models(experts / "base", experts / "expert-a", f"{experts / 'base'}+{experts / 'lora'}"))
    assert run(*command, "merge.yaml", "plain", folder=tmp_path).returncode == 0
    names = {"base": "my base", "expert-a": 'the "best" expert', "lora": "it's an adapter"}
    for name, other in names.items():
        (tmp_path / other).symlink_to(experts / name)
    base, expert, lora = names.values()
    wrote(tmp_path, of_models(base, expert, f"{base}+{lora}"))
    done = run(*command, "merge.yaml", "out", folder=tmp_path)
    assert (done.returncode, "rror" in done.stderr) == (0, False), done.stderr
    assert same(read(tmp_path / "out"), read(tmp_path / "plain"))
    assert expert in (tmp_path / "out" / "README.md").read_text()
    written = yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())
    assert [entry["model"] for entry in written["models"]] == [expert, f"{base}+{lora}"]
