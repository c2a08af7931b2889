"""Numbers that are none, on every option and in every YAML; and names that a terminal or a page would obey."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from neuron_methods.cli import SUBCOMMANDS, main
from neuron_methods.cli.common import Count, Share
from neuron_methods.evaluation.task_file import load_tasks
from neuron_methods.routing.route_yaml import read_config
from neuron_methods.sharing.card_sections import code
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import columns, markdown, printable, shortened

EVIL = "\x1b]0;owned\x07\x1b[31m\u202e<script>alert(1)</script>|`[a](b)"


def numeric_options():
    """Every option of every subcommand that takes a number."""
    for name in SUBCOMMANDS:
        command = main.get_command(click.Context(main), name)
        for parameter in command.params:
            if isinstance(parameter, click.Option) and isinstance(
                parameter.type, (click.types.IntParamType, click.types.FloatParamType)
            ):
                yield name, parameter


NUMERIC = list(numeric_options())


@pytest.mark.parametrize(("command", "option"), NUMERIC, ids=[f"{c}{o.opts[0]}" for c, o in NUMERIC])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-5", "1e400", "9" * 30, "", "x", "0x10", "\x1b[31m"])
def test_an_option_takes_numbers_that_can_be(command, option, value):
    if command == "merge" and not isinstance(option.type, (Count, Share)):
        return  # of mergekit, whose own it is
    with pytest.raises(click.BadParameter):
        option.type.convert(value, option, None)


@pytest.mark.parametrize(
    ("section", "key"),
    [("router", k) for k in ("hidden", "top_k", "temperature", "in_domain_share", "samples", "holdout", "epochs")]
    + [("router", k) for k in ("patience", "learning_rate", "seed", "ood_margin", "layer")]
    + [("enhancement", k) for k in ("tolerance", "patience", "density", "samples", "enabled")]
    + [("text", "max_length"), ("text", "end_of_sequence"), ("merging", "seed"), (None, "batch_size")],
)
def test_a_route_takes_numbers_that_can_be(section, key, tmp_path):
    experts = [{"name": name, "adapter": name, "data": {"source": "x"}} for name in "ab"]
    for value in (float("nan"), float("inf"), -float("inf"), -1e9, 10**30, "1", [[]], {"x": 1}):
        content = {"base_model": "x", "experts": experts}
        content |= {key: value} if section is None else {section: {key: value}}
        (tmp_path / "route.yml").write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=rf"route\.yml, line \d+: (\w+\.)?{key}") as caught:
            read_config(tmp_path / "route.yml")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "key", ["limit", "batch_size", "max_new_tokens", "max_length", "stop", "metric", "kind", "name"]
)
def test_a_task_takes_values_that_can_be(key, tmp_path):
    for value in (float("nan"), float("inf"), -1, 10**30, 0.5, True, [], {"x": 1}, [1], "", EVIL, "x" * 300):
        if key == "stop" and isinstance(value, str) and value:
            continue
        task = {"name": "t", "kind": "generation", "data": "x/y", key: value}
        (tmp_path / "tasks.yml").write_text(yaml.safe_dump({"tasks": [task]}))
        with pytest.raises(UserError, match=r"tasks\.yml, line \d+: task ") as caught:
            load_tasks(tmp_path / "tasks.yml")
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_no_terminal_obeys_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = EVIL.replace("/", "_")
    Path(name).write_text("x")
    os.makedirs(f"{name}.d")
    for arguments in (
        ["evaluate", name, "--task", name],
        ["evaluate", "x", "--task", f"{name}.d"],
        ["profile", "x", "--data", f"a={name}", "-o", name],
        ["profile", "x", "--data", f"a={name}:{name}", "-o", "x.safetensors"],
        ["profile", "show", name],
        ["groups", name, "-o", "x"],
        ["describe", name, "--describer", name, "-o", f"{name}.json", "--layers", name],
        ["describe", name, "--import-answers", name, "-o", "x.json"],
        ["route", name, "x"],
        ["generate", name, "--prompt", "x"],
        ["tune", name, "--task", name, "--search", f"{name}=1:2:3", "-o", "x"],
        ["recipes", "show", name],
        ["recipes", "new", name, name, "--base", name, "--expert", name],
        ["report", name],
        ["linearity", name],
        ["verify", name],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code in (1, 2), arguments
        assert "unexpected" not in result.output
        assert not set(result.output) & set("\x1b\x07\u202e"), (arguments, result.output)


def test_what_is_shown_of_a_name():
    assert printable("a\x1b[0m\tb\nc\u202e\udcff é") == "a\\x1b[0m\tb\nc\\u202e\\udcff é"
    assert shortened("a\nb\x07", quote=False) == "a\\nb\\x07"
    assert columns([["a\nb", "\x1b"], ["c", "d"]]) == ["a\\nb  \\x1b", "c        d"]
    assert markdown(EVIL).isprintable() and not set("<>|`[]") & set(markdown(EVIL))
    assert markdown("math-7b v1.0 (a_b)") == "math-7b v1.0 (a_b)"
    assert code("math") == "`math`" and "<script" not in code(EVIL)


def test_a_page_shows_names_as_they_are():
    from neuron_methods.sharing.report.pages import html_page

    document = {"method": EVIL, "base": EVIL, "experts": [EVIL], "rows_per_weight": None, "neurons": 1}
    page = html_page(document, [], EVIL)
    assert "<script" not in page and json.dumps(EVIL)[1:8] not in page
