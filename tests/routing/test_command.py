"""`mergekit-neuron route` and `generate` in this process: a user's run, what is refused, and going on where it was."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from neuron_methods import NeuronRoutedModel
from neuron_methods.cli import main
from neuron_methods.neurons import layer_of
from neuron_methods.routing import is_routed
from neuron_methods.routing.routes import layer_coefficients
from tests.support.routed import save_adapter, settings, write_topic


def invoke(*args, code=0):
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result


def write(content):
    Path("new.yaml").write_text(yaml.safe_dump(content))


def route(content, *options, code=0):
    write(content)
    return invoke("route", "new.yaml", "new", *options, code=code)


def refused(content, *options):
    """The one line of the error; nothing is left behind."""
    write(content)
    before = sorted(os.listdir())
    assert ".new.work" not in before
    result = route(content, *options, code=1)
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert "Traceback" not in result.stderr
    assert sorted(set(os.listdir()) - {".new.work"}) == before
    return line


# ------------------------------------------------------------------------------------------ a user's run


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_route_writes_what_generate_reads(workspace, kind):
    workspace(kind)
    shutil.rmtree("routed")
    output = route(settings(kind)).output
    assert "complete and verified: new" in output
    assert output.count("\n  original ") == 3
    assert re.search(r"^  all +100.0%$", output, re.M)
    assert is_routed("new") and not Path(".new.work").exists()
    assert sorted(os.listdir("new/adapters")) == ["animals", "colours", "numbers"]
    trace = json.loads(Path("new/enhancement.json").read_text())["experts"][0]["trace"]
    assert [step["what"] for step in trace][:2] == ["base", "original"] and trace[-1]["what"] == "enhanced"
    assert all(Path("new", name).stat().st_mode & 0o044 for name in os.listdir("new"))

    given = (
        ["--image", "data/numbers/cat/0.png", "--image", "data/animals/dog/1.png"]
        if kind == "vit"
        else ["--prompt", "one two two one", "--prompt", "cat dog dog", "--max-new-tokens", "4"]
    )
    text = invoke("generate", "new", *given).output
    assert text.count("  answer:  ") == 2
    first, second = (line for line in text.splitlines() if line.startswith("  routing: "))
    assert first.startswith("  routing: numbers ") and second.startswith("  routing: animals ")
    lines = [json.loads(line) for line in invoke("generate", "new", *given, "--json").output.splitlines()]
    assert [next(iter(line["experts"])) for line in lines] == ["numbers", "animals"]
    assert all(line["in_domain"] and line["score"] >= line["threshold"] for line in lines)


def test_dry_run_shows_the_plan_and_writes_nothing(workspace):
    workspace("llama")
    before = sorted(os.listdir())
    output = route(settings("llama"), "--dry-run").output
    assert "numbers        45           15" in output and "behind 0, 1 layers" in output
    assert sorted(os.listdir()) == sorted([*before, "new.yaml"])


def test_an_output_that_is_there_is_replaced_by_force_alone(workspace):
    workspace("llama")
    content = settings("llama", enhancement={"enabled": False})
    route(content)
    assert "new: exists already" in refused_with(content)
    assert route(content, "--force", "--quiet").stderr == ""
    Path("new/mark").touch()
    assert "mark in it is not of mergekit-neuron's making" in refused_with(content, "--force")
    shutil.rmtree("new")
    shutil.copytree("base", "new")
    assert "no output of mergekit-neuron, so --force does not replace it" in refused_with(content, "--force")


def refused_with(content, *options):
    write(content)
    return invoke("route", "new.yaml", "new", *options, code=1).stderr


def test_without_enhancement_adapters_are_as_they_were(workspace):
    workspace("llama")
    output = route(settings("llama", enhancement={"enabled": False})).output
    assert "enhancement: off" in output and "original" not in output
    for name in ("numbers", "colours", "animals"):
        old, new = (load_file(f"{root}/{name}/adapter_model.safetensors") for root in ("adapters", "new/adapters"))
        assert old.keys() == new.keys() and all((old[key] == new[key]).all() for key in old)
    stored = json.loads(Path("new/routed_config.json").read_text())
    assert all(not expert["redundant_layers"] for expert in stored["experts"])


def test_an_interrupted_run_goes_on_with_what_is_finished(workspace, monkeypatch):
    from neuron_methods.routing import build

    workspace("llama")
    done = []
    whole = build.enhance_expert

    def enhance(model, mixer, expert, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(expert)
        return whole(model, mixer, expert, *rest)

    monkeypatch.setattr(build, "enhance_expert", enhance)
    write(settings("llama"))
    invoke("route", "new.yaml", "new", code=130)
    assert not Path("new").exists() and done == ["numbers", "colours"]
    done.clear()
    output = invoke("route", "new.yaml", "new").output
    assert done == ["animals"] and output.count("(done before)") == 2
    assert json.loads(Path("new/enhancement.json").read_text()) == json.loads(
        Path("routed/enhancement.json").read_text()
    )


def test_finished_experts_serve_other_router_settings_but_no_other_enhancement(workspace):
    workspace("llama")
    first = route(settings("llama"), "--work-dir", "work").output
    assert "(done before)" not in first and Path("work").is_dir()
    other = settings("llama", router={"top_k": 3})
    assert route(other, "--work-dir", "work", "--force").output.count("(done before)") == 3
    other = settings("llama", enhancement={"density": 0.9})
    assert "(done before)" not in route(other, "--work-dir", "work", "--force").output


def test_calibration_data_of_its_own(workspace):
    workspace("llama")
    write_topic(Path("data/held.jsonl"), "numbers", 30, seed=9)
    content = settings("llama", enhancement={"enabled": False})
    content["experts"][0]["calibration"] = {"source": "data/held.jsonl"}
    assert "numbers        60           16" in route(content, "--dry-run").output  # 8 that decide, 8 that do not


def test_background_data_need_one_column(workspace):
    workspace("llama")
    Path("data/other.jsonl").write_text("".join(json.dumps({"input": f"house and tree {i}"}) + "\n" for i in range(9)))
    route(settings("llama", background=[{"source": "data/other.jsonl"}], enhancement={"enabled": False}))
    line = invoke("generate", "new", "--prompt", "house and tree", "--json").output
    assert not json.loads(line)["in_domain"]
    Path("data/other.jsonl").write_text("")
    content = settings("llama", background=[{"source": "data/other.jsonl"}])
    assert "'background-0' (other.jsonl): it is empty" in refused(content, "--force")


def test_random_assignment_and_the_score_by_probability_are_stored(workspace):
    workspace("llama")
    route(settings("llama", merging={"redundant": "random", "seed": 3}, router={"ood_score": "probability"}))
    stored = json.loads(Path("new/routed_config.json").read_text())
    assert (stored["redundant"], stored["seed"], stored["router"]["ood_score"]) == ("random", 3, "probability")


def test_what_is_dropped_is_kept_for_inputs_of_others_where_that_is_asked_for(workspace):
    folder = workspace("llama")
    route(settings("llama", merging={"dropped": "keep"}))
    stored = json.loads(Path("new/routed_config.json").read_text())
    assert (stored["redundant"], any(expert["redundant_layers"] for expert in stored["experts"])) == ("others", True)
    discarded, kept = (NeuronRoutedModel.from_pretrained(folder / name) for name in ("routed", "new"))
    for number, expert in enumerate(stored["experts"]):
        dropped = set(expert["redundant_layers"])
        assert not dropped & {layer_of(path) for path in discarded.mixer.paths_of(expert["name"])}
        assert dropped <= {layer_of(path) for path in kept.mixer.paths_of(expert["name"])}
        own, others = torch.zeros(1, 3), torch.full((1, 3), 0.5)
        own[0, number], others[0, number] = 1, 0
        for layer in dropped:
            place = kept.mixer.layers.index(layer)
            for weights, expected in ((own, 0), (own + 0.1 * others, 0)):
                found = layer_coefficients(weights / weights.sum(), kept._core, kept._there)
                assert found[0, place, number] == expected
    prompts = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert kept.route(**prompts).weights.shape == (1, 3)


# ------------------------------------------------------------------------------------------ refused


def test_adapters_of_different_bases(workspace):
    folder = workspace("llama")
    another_base()
    shutil.rmtree("adapters/colours")
    save_adapter(folder / "other-base", "llama", folder / "adapters" / "colours", 1)
    for name in ("numbers", "animals"):
        rename_base(name, folder / "base")
    content = settings("llama")
    message = refused(content)
    assert "adapters of different bases: numbers was trained on" in message and "colours on" in message
    route({**content, "check_base": False}, "--dry-run")


def another_base():
    shutil.copytree("base", "other-base")
    tensors = load_file("base/model.safetensors")
    save_file({key: 2 * value for key, value in tensors.items()}, "other-base/model.safetensors", {"format": "pt"})


def rename_base(name, base):
    file = Path("adapters", name, "adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))


@pytest.mark.parametrize("given", ["org/base", "bob/base"])
def test_a_base_of_the_hub_is_its_own_download_and_nobody_elses_model(workspace, given):
    """What the adapters were trained on is known by its repository, and the base lies in the hub's cache."""
    folder = workspace("llama")
    snapshot = folder / "hub" / "models--org--base" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    Path("base").rename(snapshot)
    for name in ("numbers", "colours", "animals"):
        rename_base(name, given)
    content = {**settings("llama"), "base_model": str(snapshot)}
    if given == "org/base":
        route(content, "--dry-run")
    else:
        assert "was trained on bob/base, base_model is" in refused(content)


def test_repositories_of_one_last_name_are_two_models(workspace):
    workspace("llama")
    for name, base in (("numbers", "alice/base"), ("colours", "bob/base"), ("animals", "alice/base")):
        rename_base(name, base)
    message = refused(settings("llama"))
    assert "numbers was trained on alice/base, colours on bob/base" in message


def test_a_copy_of_the_base_is_the_base_and_a_base_that_is_gone_is_believed_by_its_name(workspace):
    folder = workspace("llama")
    shutil.copytree("base", "copy")
    route({**settings("llama"), "base_model": "copy"}, "--dry-run")
    for name in ("numbers", "colours", "animals"):
        rename_base(name, "/gone/base")
    output = route(settings("llama"), "--dry-run").output
    assert f"trained on /gone/base; taking {folder / 'base'} for it" in output


def test_a_relative_base_is_found_from_the_adapter_too(workspace):
    workspace("llama")
    for name in ("numbers", "colours", "animals"):
        rename_base(name, "../../base")
    Path("base/model.safetensors").touch()
    assert "taking" not in route(settings("llama"), "--dry-run").output


def lose_a_weight():
    tensors = load_file("base/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, "base/model.safetensors", {"format": "pt"})


def test_a_base_that_lacks_weights_is_refused_everywhere(workspace):
    workspace("llama")
    lose_a_weight()
    lacking = "its files lack weights of LlamaForCausalLM, which its config names: model.layers.1.mlp.up_proj.weight"
    assert lacking in refused(settings("llama", check_base=False))
    assert lacking in invoke("generate", "routed", "--prompt", "one", code=1).stderr
    task = {"name": "t", "kind": "perplexity", "data": {"source": "data/numbers.jsonl"}, "columns": {"text": "input"}}
    Path("tasks.yml").write_text(yaml.safe_dump({"tasks": [task]}))
    assert lacking in invoke("evaluate", "routed", "--task", "tasks.yml", code=1).stderr


def test_a_base_that_the_adapters_were_not_trained_on(workspace):
    folder = workspace("llama")
    another_base()
    for name in ("numbers", "colours", "animals"):
        rename_base(name, folder / "base")
    message = refused({**settings("llama"), "base_model": "other-base"})
    assert "the adapter of numbers was trained on" in message and "check_base: false" in message


def test_an_adapter_of_another_shape(workspace):
    folder = workspace("llama")
    tensors = load_file("adapters/colours/adapter_model.safetensors")
    tensors = {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapters/colours/adapter_model.safetensors", metadata={"format": "pt"})
    message = refused(settings("llama"))
    assert "adapter of colours does not fit the base model: size mismatch" in message


def test_an_adapter_of_other_layers(workspace):
    workspace("llama")
    tensors = load_file("adapters/colours/adapter_model.safetensors")
    tensors = {key.replace("layers.1", "layers.7"): tensor for key, tensor in tensors.items()}
    save_file(tensors, "adapters/colours/adapter_model.safetensors", metadata={"format": "pt"})
    assert "of its tensors found no place or are missing" in refused(settings("llama"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_dora": True}, "use_dora (DoRA's norm is that of the merged weights"),
        ({"modules_to_save": ["lm_head"]}, "names lm_head, and the file holds no tensors for it"),
        ({"peft_type": "IA3"}, "an adapter of type IA3; only LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa changes the base weights"),
    ],
)
def test_adapters_that_cannot_be_mixed_per_input(workspace, change, expected):
    workspace("llama")
    file = Path("adapters/colours/adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    message = refused(settings("llama"))
    assert "adapter of colours" in message and expected in message


def test_one_expert_only(workspace):
    workspace("llama")
    content = settings("llama")
    message = refused({**content, "experts": content["experts"][:1]})
    assert "a router needs two or more to choose from, found 1" in message


def test_labels_missing(workspace):
    workspace("llama")
    rows = [json.loads(line) for line in Path("data/colours.jsonl").read_text().splitlines()]
    Path("data/colours.jsonl").write_text("".join(json.dumps({"input": row["input"]}) + "\n" for row in rows))
    message = refused(settings("llama"))
    assert "'colours' (colours.jsonl): labels are missing: no column 'target'" in message
    route(settings("llama", enhancement={"enabled": False}), "--dry-run")  # a router alone needs none


def test_labels_of_a_task_are_all_that_its_loss_counts(workspace):
    workspace("vit")
    losses = []
    for labels in (None, [0, 1, 2]):
        content = settings("vit")
        for expert in content["experts"]:
            expert["data"]["labels"] = labels
        route(content, "--force")
        losses.append(first_losses())
    assert losses[0] == losses[1]  # the head has these three
    remove_label("tree")
    for expert in content["experts"]:
        expert["data"]["labels"] = [0, 1]
    route(content, "--force")
    assert all(loss < 0.9 < other for loss, other in zip(first_losses(), losses[0], strict=True))  # ln 2 and ln 3
    content["experts"][0]["data"]["labels"] = [1, 2]
    assert "class 0 of row 0 is none of the labels that count" in refused(content, "--force")
    content["experts"][0]["data"]["labels"] = [0, 7]
    assert "data.labels: 7 is none of the model's 3 classes" in refused(content, "--force")


def first_losses():
    return [e["trace"][0]["loss"] for e in json.loads(Path("new/enhancement.json").read_text())["experts"]]


def remove_label(name):
    """Take one label's images out; those left keep the model's numbers by their names."""
    for topic in ("numbers", "colours", "animals"):
        shutil.rmtree(Path("data", topic, name))


def test_a_column_that_is_not_there(workspace):
    workspace("llama")
    content = settings("llama")
    content["experts"][2]["data"]["columns"] = {"input": "question", "target": "target"}
    assert "'animals' (animals.jsonl:question,target): there is no column 'question'" in refused(content)


@pytest.mark.parametrize("count", [0, 5])
def test_an_expert_with_no_calibration_data(workspace, count):
    workspace("llama")
    lines = Path("data/colours.jsonl").read_text().splitlines(keepends=True)
    Path("data/colours.jsonl").write_text("".join(lines[:count]))
    message = refused(settings("llama"))
    assert "colours" in message
    assert "is empty" in message if count == 0 else "1 training samples" in message


def test_calibration_data_that_is_all_blank(workspace):
    workspace("llama")
    Path("data/held.jsonl").write_text(json.dumps({"input": " ", "target": "one"}) + "\n")
    content = settings("llama")
    content["experts"][0]["calibration"] = {"source": "data/held.jsonl"}
    assert "expert 'numbers': 0 calibration samples from data source" in refused(content)


def test_data_longer_than_the_context(workspace):
    workspace("llama")
    with Path("data/colours.jsonl").open("a") as file:
        file.write(json.dumps({"input": "red " * 600, "target": "red"}) + "\n")
    content = settings("llama", router={"samples": 100})
    message = refused(content)
    assert "'colours' (colours.jsonl): a sample is 600 tokens long" in message and "512 is the limit" in message


def test_sources_and_models_that_are_not_there(workspace):
    workspace("llama")
    content = settings("llama")
    content["experts"][1]["data"]["source"] = "data/none.jsonl"
    assert "expert 'colours': data.source: there is no file or folder 'data/none.jsonl'" in refused(content)
    assert "base_model: cannot read its config (neither a directory here nor to be had from the hub)" in refused(
        {**settings("llama"), "base_model": "./none", "check_base": False}
    )
    content = settings("llama")
    content["experts"][1]["adapter"] = "./none"
    assert "./none: neither a directory nor a repository" in refused(content)
    assert "router.layer: 9 is no layer" in refused(settings("llama", router={"layer": 9}))


def test_a_prompt_longer_than_the_context(workspace):
    workspace("llama")
    file = Path("base/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 10}))
    result = invoke("generate", "routed", "--prompt", "one " * 8, "--max-new-tokens", "4", code=1)
    assert "8 tokens and --max-new-tokens 4 are more than the context of 10" in result.stderr
    invoke("generate", "routed", "--prompt", "one " * 8, "--max-new-tokens", "2")


def test_generate_wants_what_the_model_reads(workspace):
    workspace("llama")
    assert "reads text; give --prompt" in invoke("generate", "routed", "--image", "x.png", code=1).stderr
    assert "give --prompt TEXT or --image FILE" in invoke("generate", "routed", code=2).stderr
    Path("nothing").mkdir()
    assert "no routed_config.json in it" in invoke("generate", "nothing", "--prompt", "one", code=1).stderr
    assert "no token in it" in invoke("generate", "routed", "--prompt", "", code=1).stderr


def test_generate_names_an_image_that_is_none(workspace):
    workspace("vit")
    assert (
        "--image routed.yaml: cannot be read as an image"
        in invoke("generate", "routed", "--image", "routed.yaml", code=1).stderr
    )
    assert "classifies images; give --image" in invoke("generate", "routed", "--prompt", "one", code=1).stderr


def test_help_teaches_with_an_example():
    text = invoke("route", "--help").output
    for section in ("enhancement:", "router:", "merging:", "in_domain_share: 0.95", "--dry-run"):
        assert section in text


def test_help_names_every_key_with_its_default():
    from neuron_methods.cli.route import EPILOG
    from neuron_methods.routing.route_yaml import Enhancement, Merging, RouterSettings, Text

    for section in (Enhancement, RouterSettings, Merging, Text):
        for key, field in section.model_fields.items():
            default = json.dumps(field.default) if not isinstance(field.default, str) else field.default
            shown = (f"    {key}: {default}", f'    {key}: "{default}"')
            assert any(line.startswith(shown) for line in EPILOG.splitlines()), key
