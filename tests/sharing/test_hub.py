"""Upload with the real client to a stand-in of the Hub, and back again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import click.testing
import huggingface_hub
import pytest
import torch
import transformers
import yaml
from peft import AutoPeftModelForCausalLM

from neuron_methods.cli import main
from neuron_methods.support.runs import _host, claimed
from neuron_methods.support.targets import MARK
from tests.sharing.conftest import TOKEN
from tests.sharing.hub_standin import user
from tests.support.checkpoints import FAMILIES, configuration, edit, read


def command(*arguments: str) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(main, list(arguments))
    assert TOKEN not in result.output + result.stderr + str(result.exception)
    return result


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    """Folder with a merge `out` and an adapter `adapter` of tiny models with a local path each."""
    folder = tmp_path_factory.mktemp("made")
    family = checkpoints("llama-tied")
    (folder / "merge.yaml").write_text("# from " + str(family) + "/notes\n" + configuration(folder=family))
    for out, options in (("out", ["--out-shard-size", "8K"]), ("adapter", ["--as-adapter", "--rank", "4"])):
        done = click.testing.CliRunner().invoke(
            main, ["merge", str(folder / "merge.yaml"), str(folder / out), "--quiet", *options], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def out(made, tmp_path):
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def test_push_creates_uploads_and_prints_the_address(standin, out):
    before = snapshot(out)
    done = command("push", str(out), "alice/merged", "--quiet", "--private", "--commit-message", "First")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{standin.url}/alice/merged\n"
    repository = standin.repositories["alice/merged"]
    assert repository.private and repository.messages == ["First"]
    assert set(standin.files("alice/merged")) == set(before) - {MARK}  # which tells what --force may replace here
    assert len([name for name in before if name.endswith(".safetensors")]) > 1
    assert snapshot(out) == before


def test_a_log_gets_lines_and_no_bars(standin, out):
    done = command("push", str(out), "alice/merged")
    assert (done.exit_code, done.stderr) == (0, f"Uploading {out} to alice/merged\n")


def test_nothing_is_uploaded_that_another_run_writes_to(standin, out):
    with claimed(out):
        done = command("push", str(out), "alice/merged")
    assert done.exit_code == 1 and not standin.repositories
    assert done.stderr == (
        f"error: {out}: another run (process {os.getpid()} on {_host()}) writes to it now; wait for its end, or choose "
        "another name\n"
    )
    assert command("push", str(out), "alice/merged").exit_code == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_what_was_uploaded_is_downloaded_and_loads(standin, out, tmp_path):
    assert command("push", str(out), "alice/merged", "--quiet").exit_code == 0
    place = huggingface_hub.snapshot_download("alice/merged", cache_dir=tmp_path / "cache")
    inputs = FAMILIES["llama-tied"].inputs
    here, there = (transformers.AutoModelForCausalLM.from_pretrained(p).eval() for p in (out, place))
    with torch.no_grad():
        assert torch.equal(here(**inputs).logits, there(**inputs).logits)
    card = huggingface_hub.ModelCard.load(Path(place) / "README.md")
    assert card.data.library_name == "transformers"
    assert 'model_id = "alice/merged"' in card.text


def test_no_path_of_this_machine_is_uploaded(standin, made, out):
    family = str(Path((made / "merge.yaml").read_text().split()[2]).parent)
    assert family in (out / "mergekit_config.yml").read_text()
    for place in (out, made / "adapter"):
        assert command("push", str(place), f"alice/{place.name}", "--quiet").exit_code == 0
        for name, content in standin.files(f"alice/{place.name}").items():
            assert family.encode() not in content, name
            assert str(Path(family).parent).encode() not in content, name
    config = standin.files("alice/out")["mergekit_config.yml"].decode()
    assert "base_model: ./base" in config
    assert "model: ./expert-a" in config


def test_an_adapter_is_pushed_with_the_base_it_needs(standin, made, checkpoints, tmp_path):
    told = command("push", str(made / "adapter"), "alice/adapter", "--quiet")
    assert "--base-model" in told.stderr
    # Where the base's id is given, everybody can load the adapter: here the "id" is a repository of the stand-in.
    assert command("push", str(checkpoints("llama-tied") / "base"), "alice/base", "--quiet").exit_code == 0
    done = command("push", str(made / "adapter"), "alice/adapter", "--quiet", "--base-model", "alice/base")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(standin.files("alice/adapter")["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    card = huggingface_hub.ModelCard(standin.files("alice/adapter")["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("alice/base", "adapter")
    place = huggingface_hub.snapshot_download("alice/adapter", cache_dir=tmp_path / "cache")
    config = json.loads((made / "adapter" / "adapter_config.json").read_text())
    model = AutoPeftModelForCausalLM.from_pretrained(place, cache_dir=tmp_path / "cache")
    assert config["r"] == model.peft_config["default"].r


def test_a_second_push_sends_only_what_changed(standin, out):
    command("push", str(out), "alice/merged", "--quiet")
    sent = standin.count("PUT", "/objects/")
    assert sent == len(list(out.glob("*.safetensors")))
    (out / "notes.txt").write_text("more")
    told = command("push", str(out), "alice/merged", "--quiet")
    assert "note: left here, as no part of the model: notes.txt; --include" in told.stderr
    assert "notes.txt" not in standin.files("alice/merged")
    assert command("push", str(out), "alice/merged", "--quiet", "--include", "*.txt").exit_code == 0
    assert standin.count("PUT", "/objects/") == sent
    assert standin.files("alice/merged")["notes.txt"] == b"more"


@pytest.mark.parametrize("failure", [403, "drop"])
def test_an_upload_that_breaks_off_goes_on_where_it_was(standin, out, monkeypatch, failure):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    before = snapshot(out)
    shards = sorted(out.glob("*.safetensors"))

    first = []

    def fail(method, path):
        # Whichever large file comes first arrives, the others do not.
        if method != "PUT":
            return None
        first.append(path)
        return None if path == first[0] else failure

    standin.fail = fail
    broken = command("push", str(out), "alice/merged", "--quiet")
    assert broken.exit_code == 1
    assert broken.stderr.startswith("error: alice/merged: the upload did not finish: ")
    assert broken.stderr.count("\n") == 1
    arrived = len(standin.large)
    assert arrived == 1 < len(shards)
    assert standin.files("alice/merged") == {}
    assert snapshot(out) == before
    standin.fail = lambda _method, _path: None
    standin.asked.clear()
    assert command("push", str(out), "alice/merged", "--quiet").exit_code == 0
    assert standin.count("PUT", "/objects/") == len(shards) - arrived
    assert set(standin.files("alice/merged")) == set(before) - {MARK}  # which tells what --force may replace here


def test_a_hub_out_of_reach_is_told_in_one_line(standin, out, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = command("push", str(out), "alice/merged", "--quiet")
    assert done.exit_code == 1
    assert "no connection to the Hub" in done.stderr and done.stderr.count("\n") == 1


def test_one_hub_without_an_answer_says_nothing_of_another(standin, monkeypatch):
    from huggingface_hub import constants

    from neuron_methods.models.hub import hub_answers

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        meanwhile.setattr(constants, "HF_HUB_OFFLINE", False)
        assert not hub_answers()
    assert hub_answers()


def test_a_branch_and_a_pull_request(standin, out):
    done = command("push", str(out), "alice/merged", "--quiet", "--revision", "v2")
    assert done.stdout == f"{standin.url}/alice/merged/tree/v2\n"
    assert set(standin.files("alice/merged", "v2")) == set(snapshot(out)) - {MARK}
    assert standin.files("alice/merged") == {}
    done = command("push", str(out), "alice/merged", "--quiet", "--create-pr")
    assert done.stdout == f"{standin.url}/alice/merged/discussions/1\n"
    assert set(standin.files("alice/merged", "refs/pr/1")) == set(snapshot(out)) - {MARK}
    refused = command("push", str(out), "alice/merged", "--create-pr", "--revision", "v2")
    assert (refused.exit_code, "leave --revision out" in refused.stderr) == (1, True)


def test_a_pull_request_to_a_repository_of_others(standin, out):
    standin.users["hf_other"] = user("bob")
    assert command("push", str(out), "lab/theirs", "--quiet").exit_code == 0
    standin.repositories["bob/model"] = standin.repositories["lab/theirs"]
    (out / "more.txt").write_text("mine")
    done = command("push", str(out), "bob/model", "--quiet", "--create-pr", "--include", "more.txt")
    assert done.stdout == f"{standin.url}/bob/model/discussions/1\n"


def test_private_does_not_upload_to_what_is_public(standin, out):
    assert command("push", str(out), "alice/merged", "--quiet").exit_code == 0
    done = command("push", str(out), "alice/merged", "--quiet", "--private")
    assert (done.exit_code, "exists and is public" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("token", "whoami", "repository", "said"),
    [
        (None, None, "alice/merged", "no token for the Hub"),
        ("hf_wrong", None, "alice/merged", "the token is not valid"),
        ("hf_1", user("alice", role="read"), "alice/merged", "may only read"),
        ("hf_1", user("alice"), "bob/merged", "no member of bob"),
        ("hf_1", user("alice", orgs={"readers": "read"}), "readers/merged", "may only read in readers"),
        ("hf_1", user("alice", role="fineGrained", fine={"scoped": []}), "alice/merged", "fine-grained"),
        ("hf_1", user("alice"), "merged", "give USER/NAME"),
        ("hf_1", user("alice"), "a/b/c", "give USER/NAME"),
    ],
)
def test_rights_are_checked_before_the_merge(standin, made, monkeypatch, token, whoami, repository, said):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
        if whoami:
            standin.users[token] = whoami
    done = command("merge", str(made / "merge.yaml"), str(made / "never"), "--push-to-hub", repository)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
    assert said in done.stderr
    assert "Merging" not in done.stderr and not (made / "never").exists()
    if token:
        assert token not in done.output


def test_a_fine_grained_token_that_may_write(standin, out, monkeypatch):
    scope = {"entity": {"type": "user", "name": "alice"}, "permissions": ["repo.content.read", "repo.write"]}
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    standin.users["hf_fine"] = user("alice", role="fineGrained", fine={"scoped": [scope]})
    assert command("push", str(out), "alice/merged", "--quiet").exit_code == 0


def test_the_server_has_the_last_word_on_rights(standin, out):
    standin.users[TOKEN]["orgs"].append({"name": "closed", "roleInOrg": "contributor"})
    standin.fail = lambda _method, path: 403 if path == "/api/repos/create" else None
    done = command("push", str(out), "closed/merged", "--quiet")
    assert (done.exit_code, "the token may not write there" in done.stderr) == (1, True)


def test_a_server_that_quotes_the_token_does_not_get_it_printed(standin, out):
    standin.fail = lambda _method, path: 400 if path == "/api/repos/create" else None
    standin.says = f"malformed: Bearer {TOKEN}"
    done = command("push", str(out), "alice/merged", "--quiet")
    assert (done.exit_code, "malformed: Bearer ***" in done.stderr) == (1, True)


def test_merge_and_push_in_one_command(standin, made, tmp_path):
    done = command("merge", str(made / "merge.yaml"), str(tmp_path / "new"), "--quiet", "--push-to-hub", "lab/new")
    assert (done.exit_code, done.stdout) == (0, f"{standin.url}/lab/new\n"), done.output
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == standin.files("lab/new")["model.safetensors"]
    refused = command("merge", str(made / "merge.yaml"), str(tmp_path / "x"), "--private")
    assert (refused.exit_code, "--private goes with --push-to-hub" in refused.stderr) == (2, True)


def test_an_output_that_is_not_whole_is_refused(standin, out, made, tmp_path):
    def refused(place, *said):
        done = command("push", str(place), "alice/merged", "--quiet")
        assert done.exit_code == 1 and done.stderr.count("\n") == 1
        assert all(part in done.stderr for part in said), done.stderr

    refused(tmp_path / "nothing", "no such directory")
    refused(tmp_path, "holds no model")
    shard = sorted(out.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(out, shard.name, "not a complete safetensors file")
    shard.unlink()
    refused(out, shard.name, "no such file")
    whole = shutil.copytree(made / "out", tmp_path / "whole")
    for file in whole.glob("model*"):
        file.unlink()
    refused(whole, "no weights")
    torch.save({}, whole / "pytorch_model.bin")
    refused(whole, "pickle")
    from safetensors.torch import save_file

    save_file(read(made / "out"), whole / "model.safetensors")
    edit(whole, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(whole, "model.layers.1.mlp.up_proj.weight", "missing")
    adapter = shutil.copytree(made / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "adapter_model.safetensors")
    assert standin.repositories == {}


@pytest.fixture
def routed(tmp_path):
    """A small routed model; what made it is gone."""
    from tests.support.routed import make_workspace, settings

    (tmp_path / "made").mkdir()
    folder = make_workspace("llama", tmp_path / "made")
    (folder / "route.yml").write_text(yaml.safe_dump(settings("llama", router={"epochs": 2})))
    done = click.testing.CliRunner().invoke(
        main, ["route", str(folder / "route.yml"), str(tmp_path / "routed")], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return tmp_path / "routed"


def test_a_routed_model_is_pushed_and_loads_again(standin, routed, tmp_path):
    from neuron_methods.routing import NeuronRoutedModel

    base = Path(json.loads((routed / "routed_config.json").read_text())["base_model"])
    told = command("push", str(routed), "alice/routed", "--quiet")
    assert (told.exit_code, "--base-model" in told.stderr) == (1, True)
    assert command("push", str(routed / base), "alice/base", "--quiet").exit_code == 0
    done = command("push", str(routed), "alice/routed", "--quiet", "--base-model", "alice/base")
    assert (done.exit_code, done.stdout) == (0, f"{standin.url}/alice/routed\n"), done.output
    for name, content in standin.files("alice/routed").items():
        assert str(tmp_path).encode() not in content, name
    card = huggingface_hub.ModelCard(standin.files("alice/routed")["README.md"].decode())
    assert card.data.base_model == ["alice/base"] and "from_pretrained(model_id)" in card.text
    model = NeuronRoutedModel.from_pretrained("alice/routed", cache_dir=str(tmp_path / "cache"))
    assert set(model.experts) == {path.name for path in (routed / "adapters").iterdir()}
    (routed / "router.safetensors").unlink()
    refused = command("push", str(routed), "alice/routed", "--quiet", "--base-model", "alice/base")
    assert (refused.exit_code, "router.safetensors" in refused.stderr) == (1, True)


def test_a_routed_model_is_pushed_with_the_heads_of_its_experts(standin, tmp_path):
    from neuron_methods.routing import NeuronRoutedModel
    from tests.support.routed import HEADS, headed_settings, make_headed_workspace

    (tmp_path / "made").mkdir()
    folder, out = make_headed_workspace(tmp_path / "made"), tmp_path / "routed"
    settings = headed_settings(enhancement={"enabled": False}, router={"epochs": 2})
    (folder / "routed.yaml").write_text(yaml.safe_dump(settings))
    assert command("route", str(folder / "routed.yaml"), str(out)).exit_code == 0
    assert command("push", str(folder / "base"), "alice/base", "--quiet").exit_code == 0
    done = command("push", str(out), "alice/routed", "--quiet", "--base-model", "alice/base")
    assert (done.exit_code, done.stdout) == (0, f"{standin.url}/alice/routed\n"), done.output
    assert "with a head for 3 labels: cat, dog, owl" in standin.files("alice/routed")["README.md"].decode()
    model = NeuronRoutedModel.from_pretrained("alice/routed", cache_dir=str(tmp_path / "cache"))
    assert model.heads.classes.heads[:4] == tuple(HEADS)


def test_route_checks_the_token_first_and_pushes(standin, tmp_path, monkeypatch):
    from tests.support.routed import make_workspace, settings

    (tmp_path / "made").mkdir()
    folder = make_workspace("llama", tmp_path / "made")
    config, out = folder / "route.yml", tmp_path / "routed"
    config.write_text(yaml.safe_dump(settings("llama", router={"epochs": 2, "samples": 20})))
    push = ("--push-to-hub", "alice/routed")
    for told, arguments in (("no member of bob", ("--push-to-hub", "bob/x")), ("--base-model", push)):
        refused = command("route", str(config), str(out), *arguments)
        assert (refused.exit_code, told in refused.stderr, out.exists()) == (1, True, False), refused.output
    done = command("route", str(config), str(out), *push, "--base-model", "alice/base")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, f"{standin.url}/alice/routed"), done.output
    assert "routed_config.json" in standin.files("alice/routed")
    assert command("route", str(config), str(out), "--private").exit_code == 2
