"""Files of a routed model that say what they should not: one line each, and nothing foreign is written or removed."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_methods import NeuronRoutedModel
from neuron_methods.routing.routed_files import RoutedConfig, RoutedExpert, RouterShape
from neuron_methods.support.errors import UserError
from tests.support.routed import EXPERTS, make_workspace


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A routed model put together from untrained parts; nobody changes it."""
    folder = make_workspace("llama", tmp_path_factory.mktemp("routed"))
    place = folder / "routed"
    place.mkdir()
    (folder / "adapters").rename(place / "adapters")
    config = json.loads((folder / "base" / "config.json").read_text())
    shape = RouterShape((0,), "mean", config["hidden_size"], 4, 2, 1, 1.0, "combined", -1e30)
    from neuron_methods.routing.router import Router

    save_file(dict(Router(shape, len(EXPERTS)).state_dict()), place / "router.safetensors")
    RoutedConfig("../base", tuple(map(RoutedExpert, EXPERTS)), shape).write(place)
    return place


@pytest.fixture
def copied(routed):
    place = routed.with_name("copied")
    shutil.copytree(routed, place)
    yield place
    shutil.rmtree(place)


def changed(place, **changes):
    file = place / "routed_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def line_of(place) -> str:
    with pytest.raises(UserError) as caught:
        NeuronRoutedModel.from_pretrained(place)
    (line,) = str(caught.value).splitlines()
    assert line.isprintable()
    return line


@pytest.mark.parametrize(
    "name", ["/tmp/x", "../x", "..", "a/b", "", ".", "a\n", "\x1b[31m", "é", "x" * 300, 1, None, ["a"]]
)
def test_names_of_experts_are_no_paths(copied, name):
    changed(copied, experts=[{"name": name, "redundant_layers": []}, {"name": "numbers", "redundant_layers": []}])
    assert "routed_config.json: experts[0].name: " in line_of(copied)
    with pytest.raises(ValueError, match="RoutedExpert"):
        RoutedExpert(name)


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_k", v) for v in (0, -1, 4, 1.5, True, "1", None)]
    + [("temperature", v) for v in (0, -1.0, float("nan"), float("inf"), "1", None)]
    + [("layers", v) for v in ([], [-1], [99], ["a"], 0, None, list(range(2000)))]
    + [("width", v) for v in (0, 10**9, 10**30, 17, "16")]
    + [("hidden", v) for v in (0, 10**9, 5)]
    + [("axes", v) for v in (-1, 10**9, 3)]
    + [("pooling", "all"), ("ood_score", "x"), ("ood_threshold", float("nan")), ("more", 1)],
)
def test_a_router_is_what_its_config_can_say(copied, key, value):
    router = json.loads((copied / "routed_config.json").read_text())["router"]
    changed(copied, router={**router, key: value})
    line = line_of(copied)
    assert "routed_config.json: router" in line or "router.safetensors: " in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": []}, "experts: "),
        ({"experts": [{"name": "numbers"}, {"name": "numbers"}]}, "two have one name"),
        ({"experts": [{"name": n, "redundant_layers": ["no.layer"]} for n in EXPERTS]}, "no layer 'no.layer'"),
        ({"experts": {"name": "numbers"}}, "experts: "),
        ({"base_model": ""}, "base_model: "),
        ({"base_model": 3}, "base_model: "),
        ({"seed": -1}, "seed: "),
        ({"redundant": "x"}, "redundant: "),
        ({"more": 1}, "more: "),
        ({"format_version": [1]}, "format_version"),
    ],
)
def test_configs_that_say_something_else(copied, changes, message):
    changed(copied, **changes)
    assert message in line_of(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_is_of_numbers(copied, value):
    state = load_file(copied / "router.safetensors")
    state["mean"][0] = value
    save_file(state, copied / "router.safetensors")
    assert "router.safetensors: mean holds values that are no numbers" in line_of(copied)


@pytest.mark.parametrize(
    "name",
    ["routed_config.json", "router.safetensors"]
    + [f"adapters/numbers/adapter_{what}" for what in ("config.json", "model.safetensors")],
)
def test_what_is_no_file_of_the_model_is_not_read(copied, name):
    outside = copied.parent / "outside"
    shutil.move(copied / name, outside)
    os.symlink(outside, copied / name)
    assert "a link that leads out of" in line_of(copied)
    (copied / name).unlink()
    os.mkfifo(copied / name)
    assert "no regular file" in line_of(copied)
    (copied / name).unlink()
    (copied / name).mkdir()
    assert "Is a directory" in line_of(copied)
    outside.unlink()


def test_saving_removes_nothing_and_follows_no_link(copied, tmp_path):
    model = NeuronRoutedModel.from_pretrained(copied)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    out = tmp_path / "out"
    (out / "adapters" / "colours" / "deep").mkdir(parents=True)
    (out / "adapters" / "colours" / "deep" / "notes").write_text("mine")
    os.symlink(foreign / "precious", out / "adapters" / "colours" / "adapter_config.json")
    os.symlink(foreign / "precious", out / "router.safetensors")
    model.save_pretrained(out)
    assert (out / "adapters" / "colours" / "deep" / "notes").read_text() == "mine"
    again = NeuronRoutedModel.from_pretrained(out)
    assert torch.equal(again.router.inner.weight, model.router.inner.weight)
    os.rename(out / "adapters" / "colours", tmp_path / "aside")
    os.symlink(foreign, out / "adapters" / "colours")
    with pytest.raises(UserError, match="a link that leads out of"):
        model.save_pretrained(out)
    assert sorted(os.listdir(foreign)) == ["precious"] and (foreign / "precious").read_text() == "x"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--device", d) for d in ("nonsense", "", "cuda:99", "meta", "\x1b")] + [("--prompt", "\udcff")],
)
def test_devices_and_prompts_that_are_none(routed, option, value):
    from click.testing import CliRunner

    from neuron_methods.cli import main

    arguments = ["generate", str(routed), option, value, *([] if option == "--prompt" else ["--prompt", "one"])]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {option} ")
