"""Nothing outside of a model's directory is followed, and of OUT only what makes the model is uploaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.support.targets import MARK
from tests.sharing.conftest import standin  # noqa: F401
from tests.support.checkpoints import configuration
from tests.support.hub_cache import cache
from tests.support.tokenizers import save_tokenizer

SECRET = "s3cr3t-of-the-machine"
#: Names under which a merge would take a file along.
COMPANIONS = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "preprocessor_config.json",
    "additional_chat_templates/a.jinja",
    "credentials.json",
]
#: How a link may lead out.
WAYS = {
    "absolute": lambda place, secret: place.symlink_to(secret),
    "relative": lambda place, secret: place.symlink_to(os.path.relpath(secret, place.parent)),
    "by another link": lambda place, secret: (
        (place.parent / "step").symlink_to(secret),
        place.symlink_to("step"),
    ),
    "by a folder": lambda place, secret: (
        (place.parent / "folder").symlink_to(secret.parent),
        place.symlink_to(f"folder/{secret.name}"),
    ),
}


@pytest.fixture
def folder(workspace, tmp_path):
    folder = workspace("llama-tied")
    save_tokenizer(folder / "base", ["<unk>", *(f"w{i}" for i in range(39))])
    (folder / "merge.yml").write_text(configuration("task_arithmetic", parameters={"weight": 0.5}))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text(SECRET)
    return folder


def command(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def told(place: Path) -> bool:
    """Whether the secret lies in a directory."""
    return any(SECRET.encode() in file.read_bytes() for file in place.rglob("*") if file.is_file())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", COMPANIONS)
def test_a_companion_that_leads_out_is_not_taken_along(folder, tmp_path, name, way):
    place = folder / "base" / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    WAYS[way](place, tmp_path / "elsewhere" / "secret")
    done = command("merge", "merge.yml", "out", "--quiet")
    assert "unexpected" not in done.output, done.output
    assert not (folder / "out").exists() or not told(folder / "out")


@pytest.fixture
def out(folder):
    done = command("merge", "merge.yml", "out", "--quiet")
    assert done.exit_code == 0, done.output
    return folder / "out"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["README.md", "notes.txt", "tokenizer_config.json", "report/report.html", "model.py"])
def test_push_follows_no_link_out_of_it(standin, out, tmp_path, name, way):  # noqa: F811
    (out / name).unlink(missing_ok=True)
    (out / name).parent.mkdir(exist_ok=True)
    WAYS[way](out / name, tmp_path / "elsewhere" / "secret")
    for more in ([], ["--include", "*"]):
        done = command("push", out, "alice/model", "--quiet", *more)
        assert "unexpected" not in done.output, done.output
        sent = [*standin.large.values()]
        sent += standin.files("alice/model").values() if "alice/model" in standin.repositories else []
        assert not any(SECRET.encode() in content for content in sent)
    assert done.exit_code == 1 and "put the file itself there" in done.stderr


#: What lies about in a directory and is no part of a model.
STRAY = [
    ".env",
    ".git/config",
    "credentials.json",
    "hf_token.txt",
    "training_args.bin",
    "optimizer.pt",
    "trainer_state.json",
    "run.log",
    "notes.md",
    "data.csv",
    "old.safetensors",
    "checkpoint-10/model.safetensors",
    "checkpoint-10/config.json",
    "helper.py",
    "report/private.xlsx",
    "secrets/id_rsa",
]


def test_push_leaves_what_is_no_part_of_the_model(standin, out):  # noqa: F811
    before = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()} - {MARK}
    assert "left here" not in command("push", out, "alice/model", "--quiet").stderr
    for name in STRAY:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(SECRET)
    done = command("push", out, "alice/model", "--quiet")
    assert done.exit_code == 0, done.output
    assert set(standin.files("alice/model")) == before
    assert f"and {len(STRAY) - 3} more; --include" in done.stderr
    assert command("push", out, "alice/model", "--quiet", "--include", "data.*").exit_code == 0
    assert set(standin.files("alice/model")) == {*before, "data.csv"}
    refused = command("push", out, "alice/model", "--include", "nothing.*")
    assert (refused.exit_code, "fits no file" in refused.stderr) == (1, True)


def test_links_of_the_hubs_cache_are_inside(standin, out, tmp_path):  # noqa: F811
    place = cache(tmp_path / "home", "org/model", out)
    done = command("push", place, "alice/model", "--quiet")
    assert done.exit_code == 0, done.output
    assert (out / "model.safetensors").read_bytes() == standin.files("alice/model")["model.safetensors"]
    shutil.rmtree(out)
    done = command("merge", "merge.yml", "out", "--quiet")
    assert done.exit_code == 0, done.output
