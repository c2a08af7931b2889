"""A Hub that does wrong: every command comes to an end, with one line, no token in it, and works again afterwards."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.models import hub, hub_session
from neuron_methods.support.errors import UserError
from neuron_methods.support.targets import MARK
from tests.sharing.conftest import TOKEN, standin  # noqa: F401
from tests.sharing.hub_faults import FAULTS
from tests.sharing.hub_standin import hub as another_hub
from tests.sharing.hub_standin import user
from tests.support.checkpoints import configuration

#: Steps of a download and of an upload, by what is asked for: (method, part of the path).
DOWNLOAD = {
    "list": ("GET", "/api/models/"),
    "head": ("HEAD", "/resolve/"),
    "file": ("GET", "/resolve/"),
}
UPLOAD = {
    "whoami": ("GET", "whoami"),
    "create": ("POST", "/api/repos/create"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "large file": ("PUT", "/objects/"),
    "commit": ("POST", "/commit/"),
}
#: With MERGEKIT_NEURON_HOSTILE every fault at every step; else all at the steps that carry most, and at the
#: others those that are handled by different code.
ALL = "MERGEKIT_NEURON_HOSTILE" in os.environ
_DIFFERENT = ("silent", "slow head", "half", "closed", "to itself", "html", "wrong types", "429 for an hour", "503")
FAULTS_OF_DOWNLOADS = [(s, f) for s in DOWNLOAD for f in FAULTS if ALL or s == "file" or f in _DIFFERENT]
FAULTS_OF_UPLOADS = [(s, f) for s in UPLOAD for f in FAULTS if ALL or s == "whoami" or f in _DIFFERENT]


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "merge.yml").write_text(configuration("linear", checkpoints("llama-tied")))
    done = CliRunner().invoke(main, ["merge", str(folder / "merge.yml"), str(folder / "out"), "--quiet"])
    assert done.exit_code == 0, done.output
    return folder / "out"


@pytest.fixture
def sound(standin, tmp_path, monkeypatch):  # noqa: F811
    """The stand-in, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    _forget()
    yield standin
    _forget()


@contextmanager
def wrong(hub_at_fault, fail):
    """Let a Hub do wrong within the block, where the bounds are short; outside of it a slow machine has time."""
    short = {"CONNECTING": 0.3, "ANSWER": {}, "ANSWER_TO_CHANGE": 0.2, "STALL": 0.4, "LEAST": 2000}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in short.items():
            patch.setattr(hub_session, name, value)
        patch.setattr(hub_at_fault, "fail", fail)
        _forget()
        yield
    _forget()


def _forget() -> None:
    hub._probe.cache_clear()
    hub.hub_file.cache_clear()
    huggingface_hub.close_session()


def fail_at(step: tuple[str, str], fault):
    method, part = step
    return lambda asked, path: fault if asked == method and part in path else None


def store(standin, place: Path, name: str = "alice/model") -> None:  # noqa: F811
    done = CliRunner().invoke(main, ["push", str(place), name, "--quiet"])
    assert done.exit_code == 0, done.output
    standin.asked.clear()


@pytest.mark.parametrize(("step", "fault"), FAULTS_OF_DOWNLOADS)
def test_a_download_ends_and_spoils_nothing(sound, made, tmp_path, step, fault):
    store(sound, made)
    with wrong(sound, fail_at(DOWNLOAD[step], FAULTS[fault])):
        try:
            place = Path(hub.snapshot("alice/model"))
        except UserError as error:
            assert str(error).startswith("model alice/model: ")
            assert TOKEN not in str(error) and len(str(error).splitlines()) == 1
        else:  # then it has done no harm
            assert (place / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    place = Path(hub.snapshot("alice/model"))
    for file in (file for file in made.iterdir() if file.name != MARK):  # which is not uploaded
        if file.suffix in (".safetensors", ".json"):
            assert (place / file.name).read_bytes() == sound.files("alice/model")[file.name], file.name


@pytest.mark.parametrize(("step", "fault"), FAULTS_OF_UPLOADS)
def test_an_upload_ends_and_goes_on(sound, made, step, fault):
    with wrong(sound, fail_at(UPLOAD[step], FAULTS[fault])):
        done = CliRunner().invoke(main, ["push", str(made), "alice/model", "--quiet", "--debug"])
    assert TOKEN not in done.output
    assert "unexpected" not in done.output, done.output
    if done.exit_code:
        assert done.stderr.splitlines()[-1].startswith("error: alice/model: "), done.output
    if step == "whoami" and not ALL:
        return  # nothing has begun
    store(sound, made)
    assert set(sound.files("alice/model")) >= {"model.safetensors", "config.json", "README.md"}


COMMANDS = {
    "merge": ["merge", "merge.yml", "out", "--quiet"],
    "evaluate": ["evaluate", "alice/model", "--task", "tasks.yml", "-q", "-o", "scores.json"],
    "profile": ["profile", "alice/model", "--data", "n=data.jsonl:text", "-o", "p.safetensors"],
    "generate": ["generate", "alice/model", "--prompt", "one"],
    "verify": ["merge", "merge.yml", "out", "--dry-run"],
}


@pytest.mark.parametrize("fault", list(FAULTS) if ALL else ["silent", "half", "other", "html", "in a circle"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_downloads_ends_in_one_line(sound, made, tmp_path, monkeypatch, command, fault):
    monkeypatch.chdir(tmp_path)
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in ("alice/model", str(made))]
    (tmp_path / "merge.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    task = {"name": "t", "kind": "perplexity", "data": {"source": "data.jsonl"}, "columns": {"text": "text"}}
    (tmp_path / "tasks.yml").write_text(yaml.safe_dump({"tasks": [task]}))
    (tmp_path / "data.jsonl").write_text('{"text": "one two"}\n' * 4)
    store(sound, made)
    with wrong(sound, lambda _method, path: FAULTS[fault] if "alice" in path else None):
        done = CliRunner().invoke(main, COMMANDS[command])
    assert done.exit_code == 1, done.output
    assert "unexpected" not in done.output and TOKEN not in done.output, done.output
    assert done.stderr.splitlines()[-1].startswith("error: "), done.output
    assert "alice/model" in done.stderr


def test_the_token_does_not_follow_to_another_host(sound, made):
    store(sound, made)
    with another_hub() as elsewhere:
        elsewhere.users[TOKEN] = user("alice")
        where = elsewhere.url.replace("127.0.0.1", "localhost")

        def away(_state, request, _answer):
            request.send_response(307)
            request.send_header("Location", where + request.path)
            request.send_header("Content-Length", "0")
            request.end_headers()

        with wrong(sound, lambda _method, _path: away):
            with pytest.raises(UserError):
                hub.snapshot("alice/model")
            CliRunner().invoke(main, ["push", str(made), "alice/model", "--quiet"])
        assert elsewhere.asked
        assert TOKEN not in str(elsewhere.headers)


def test_a_certificate_that_is_none_is_told(sound, made, monkeypatch):
    from huggingface_hub import constants

    secure = sound.url.replace("http:", "https:")
    monkeypatch.setattr(constants, "ENDPOINT", secure)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", secure + "/{repo_id}/resolve/{revision}/{filename}")
    done = CliRunner().invoke(main, ["push", str(made), "alice/model", "--quiet"])
    assert (done.exit_code, "no connection to the Hub" in done.stderr) == (1, True), done.output
    with pytest.raises(UserError, match="not in the Hub's cache"):
        hub.snapshot("alice/model")


def test_an_upload_that_broke_off_says_what_has_arrived(sound, made, tmp_path):
    out = Path(shutil.copytree(made, tmp_path / "out"))
    first = []

    def fail(method, path):
        first.extend([path] if method == "PUT" and not first else [])
        return FAULTS["silent"] if "/commit/" in path else None

    with wrong(sound, fail):
        done = CliRunner().invoke(main, ["push", str(out), "alice/model", "--quiet"])
    assert done.exit_code == 1
    assert "have arrived" in done.stderr and "push again" in done.stderr
    assert len(sound.large) == 1
