"""The command of the page, as far as it goes without a browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from click.testing import CliRunner

from neuron_methods.cli import main
from tests.support.commands import running


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            ["--host", "0.0.0.0"],
            "error: --host 0.0.0.0: others can reach the page there; name the one directory they may use: --root DIR",
        ),
        (["--root", "nowhere"], "error: --root nowhere: no such directory"),
        (["--config", "nothing.yml"], "error: nothing.yml: "),
        (["--port", "1", "--host", "192.0.2.1", "--root", "."], "error: 192.0.2.1: cannot listen at port 1 ("),
    ],
)
def test_what_cannot_be_is_one_line(line, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # the command may change them
    result = CliRunner().invoke(main, ["ui", "--no-browser", *line])
    assert result.exit_code == 1 and result.stdout == ""
    (said,) = result.stderr.splitlines()
    assert said.startswith(told)


def test_without_gradio_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(main, ["ui", "--no-browser"])
    assert (result.exit_code, result.stderr) == (1, "error: the page needs Gradio: pip install 'mergekit-neuron[ui]'\n")


@pytest.mark.parametrize(("line", "found"), [([], None), (["--use-token"], "hf_x")])
def test_others_have_no_use_of_the_token_unless_it_is_said(line, found, tmp_path):
    code = f"""
import json
from neuron_methods.cli import main
try:
    main(["ui", "--host", "0.0.0.0", "--root", "nowhere", *{line}])
except SystemExit:
    pass
from huggingface_hub import get_token
print(json.dumps(get_token()))
"""
    (tmp_path / "token").write_text("hf_stored")
    given = {**os.environ, "HF_TOKEN": "hf_x", "HF_TOKEN_PATH": str(tmp_path / "token")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, cwd=tmp_path)
    assert json.loads(done.stdout) == found
    assert "hf_" not in done.stderr


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")])
def test_it_ends_by_a_signal_without_a_traceback(number, code, said, tmp_path):
    with running("-m", "neuron_methods", "ui", "--no-browser", folder=tmp_path) as process:
        address = process.stdout.readline().strip()
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as page:
            assert page.status == 200
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", said)
    assert process.returncode == code
