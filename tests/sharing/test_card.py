"""The card of a merge, read by huggingface_hub as the Hub would."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import huggingface_hub
import pytest
import yaml
from mergekit.common import ModelPath
from mergekit.merge_methods import registry

import neuron_methods
from neuron_methods.cli import main
from neuron_methods.plugin.configuration import read_configuration
from neuron_methods.routing.own_choices import OURS
from neuron_methods.routing.routed_files import RoutedConfig, RoutedExpert, RouterShape
from neuron_methods.sharing.card import CardOptions, make_card, with_model_id
from neuron_methods.sharing.citations import CITATIONS
from neuron_methods.sharing.licences import Licence, find_licences, read_licence
from neuron_methods.sharing.routed_card import make_routed_card
from neuron_methods.support.sources import LIANG
from tests.support.checkpoints import configuration

HUB = """merge_method: neuro_merging
base_model: org/base
models:
  - model: org/math@v2
  - model: org/base+org/code-lora
  - model: /data/models/law
"""


def card(source=HUB, place=Path("nowhere"), **options):
    neuron_methods.register()
    made = make_card(read_configuration(source), source, "my-merge", place, CardOptions(**options))
    return huggingface_hub.ModelCard(made.text), made


def write_card(folder: Path, **front: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A model\n")


def test_front_matter_is_what_the_hub_reads():
    read, _ = card()
    assert read.data.base_model == ["org/base", "org/math", "org/code-lora"]
    assert read.data.base_model_relation == "merge"
    assert read.data.library_name == "transformers"
    assert read.data.tags == ["mergekit", "merge", "mergekit-neuron", "neuro_merging"]
    assert read.data.license is None
    text = read.text
    assert text.index("# my-merge") < text.index("[org/math](https://huggingface.co/org/math)")
    assert "`law` (a local directory)" in text and "/data" not in text


def test_local_models_leave_no_trace_in_the_front_matter():
    read, _ = card(configuration(folder="/data/secret"))
    assert read.data.base_model is None
    assert "base_model_relation" not in read.data.to_dict()
    assert "/data" not in read.content and "secret" not in read.content


@pytest.mark.parametrize("method", ["neuro_merging", "min_merging", "neuron_merge", "ties", "linear", "slerp"])
def test_the_method_is_told_with_its_source(method):
    source = f"merge_method: {method}\nbase_model: org/base\nmodels:\n  - model: org/a\n"
    parameters = {"slerp": "parameters: {t: 0.5}\n", "linear": "parameters: {weight: 1}\n"}.get(method, "")
    read, _ = card(source + parameters)
    if method in CITATIONS:
        assert CITATIONS[method].source.line in read.text and CITATIONS[method].source.url in read.text
        assert CITATIONS[method].bibtex in read.text
        assert CITATIONS[method].text.count(". ") == 2, "three sentences"
    assert "goddard-etal-2024-arcees" in read.text
    assert f"merge_method: {method}" in read.text


def clauses(source: str) -> list[str]:
    """What the card's section of the method lists, after saying whose it is."""
    section = card(source)[0].text.split("## Method: ")[1].split("\n## ")[0]
    return [line[2:] for line in section.splitlines() if line.startswith("- ")]


def own(method: str, *beginnings: str) -> list[str]:
    """The clauses of a method that begin so, in their order."""
    found = [choice.text for choice in registry.get(method).spec.ours if choice.text.startswith(beginnings)]
    assert len(found) == len(beginnings)
    return found


def test_what_is_ours_is_told_by_what_the_merge_does():
    neuron_methods.register()
    assert clauses(HUB) == own("neuro_merging", "the share of an update that is kept, 15 %")
    plain = "density: 0.1, lambda_orthogonal: 2.7, spectral_exponent: 1.0, weight: 1"
    assert clauses(HUB + f"parameters: {{{plain}}}\n") == []
    assert "Ours" not in card(HUB + f"parameters: {{{plain}}}\n")[0].text
    both = "density: 0.1, lambda_parallel: -0.5, lambda_orthogonal: 2"
    of_both = ("the merged coefficient", "norms and biases are scaled by λ₂ alone")
    assert clauses(HUB + f"parameters: {{{both}}}\n") == own("neuro_merging", *of_both)
    assert clauses(HUB + f"parameters: {{{both}, lambda_points: mean}}\n") == own("neuro_merging", of_both[0])
    filtered = "[{filter: mlp, value: 0.5}, {value: 1.0}]"
    forms = f"trim: differing, lambda_orthogonal: norm, spectral_exponent: {filtered}, density: 0.25, embeddings: mean"
    told = (
        "instead of each expert's largest",
        "every neuron's merged update",
        "the singular values",
        "token embeddings",
    )
    assert clauses(HUB + f"parameters: {{{forms}}}\n") == own("neuro_merging", *told)


@pytest.mark.parametrize("method", ["min_merging", "neuron_merge"])
def test_what_is_ours_is_told_where_the_source_leaves_much_open(method):
    neuron_methods.register()
    assert clauses(HUB.replace("neuro_merging", method)) == [choice.text for choice in registry.get(method).spec.ours]


def test_a_method_of_our_own_names_its_kin_and_leads_to_no_paper():
    text = card(HUB.replace("neuro_merging", "neuron_response"))[0].text
    assert "merge of fine-tuned models by Merging by response on the base" in text
    assert "A method of mergekit-neuron, which no paper describes." in text
    for kin in registry.get("neuron_response").spec.kin:
        assert f"- [{kin.source.line}]({kin.source.url}): {kin.shares}" in text


def test_the_card_of_a_routed_model_tells_what_is_ours(tmp_path):
    shape = {"layers": (0,), "width": 4, "hidden": 2, "axes": 1, "top_k": 1, "temperature": 1.0}
    told = {}
    kind = "ViTForImageClassification"
    for pooling, score, heads in (("moments", "combined", kind), ("mean", "probability", None)):
        router = RouterShape(**shape, pooling=pooling, ood_score=score)
        redundant = "others" if heads else "router"
        RoutedConfig("org/base", (RoutedExpert("math"),), router, redundant, architecture=heads).write(tmp_path)
        text = make_routed_card(tmp_path, "routed", "org/base")
        assert f"[{LIANG.line}]({LIANG.url})" in text
        told[score] = [choice.text for choice in OURS if f"- {choice.text}\n" in text]
    assert told["combined"] == [choice.text for choice in OURS]
    assert [text for text in told["combined"] if text not in told["probability"]] == [
        OURS[n].text for n in (1, 4, 5, 6)
    ]


def test_methods_of_mergekit_that_we_have_no_words_for_lead_to_its_reference():
    text = card(HUB.replace("neuro_merging", "della"))[0].text
    url = registry.get("della").spec.reference_url
    assert f"by [DELLA]({url})" in text and text.count(url) == 2 and "Ours" not in text


def test_the_licence_comes_from_the_base(tmp_path):
    for name, licence in (("base", "apache-2.0"), ("expert-a", "Apache-2.0"), ("expert-b", None)):
        write_card(tmp_path / name, **({"license": licence} if licence else {"language": "en"}))
    read, made = card(configuration(folder=tmp_path))
    assert read.data.license == "apache-2.0"
    assert made.warnings == []


def test_licences_in_conflict_are_told_and_none_is_claimed(tmp_path):
    write_card(tmp_path / "base", license="apache-2.0")
    write_card(tmp_path / "expert-a", license="other", license_name="my-terms", license_link="https://example.org")
    read, made = card(configuration(folder=tmp_path))
    assert read.data.license is None
    assert (
        "[!WARNING]" in read.text and "- base: apache-2.0" in read.text and "- expert-a: other (my-terms)" in read.text
    )
    assert len(made.warnings) == 1 and "different licences" in made.warnings[0]


def test_a_licence_of_its_own_keeps_name_and_link(tmp_path):
    write_card(tmp_path / "base", license="other", license_name="my-terms", license_link="https://example.org")
    read, _ = card(configuration(folder=tmp_path))
    assert (read.data.license, read.data.license_name) == ("other", "my-terms")
    assert read.data.license_link == "https://example.org"


def test_a_licence_in_the_hubs_cache_is_found_without_asking(tmp_path):
    cache = tmp_path / "models--org--base"
    write_card(cache / "snapshots" / "abc", license="mit")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert read_licence(ModelPath(path="org/base"), str(tmp_path)) == Licence("mit")
    found = find_licences(
        [ModelPath(path="org/base"), ModelPath(path="org/x")], {"org/base": "org/base", "org/x": "org/x"}, str(tmp_path)
    )
    assert (found.inherited, found.found) == (Licence("mit"), {"org/base": Licence("mit")})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# no front matter",
        b"---\nlicense: [",
        b"---\nlicense: [\n---\n",
        b"---\n- a\n---\n",
        b"---\nlicense: mit\n",
        b"---\nlicense: mit\nreleased: 2024-13-45\n---\n",
        b"---\nlicense: mit\n---\n\xff\n",
    ],
)
def test_cards_that_the_hub_cannot_read_say_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    model = ModelPath(path=str(tmp_path))
    found = find_licences([model], {model.path: "the model"})
    assert (found.found, found.inherited) == ({}, None)


EVALUATION = {
    "format": "mergekit-neuron-evaluation",
    "version": 1,
    "model": "/data/merged",
    "tasks": [
        {
            "name": "grade school",
            "kind": "generation",
            "metric": "exact_match",
            "score": 0.625,
            "low": 0.55,
            "high": 0.7,
            "count": 200,
            "source": "openai/gsm8k",
            "split": "test",
        },
        {"name": "my text", "kind": "perplexity", "metric": "perplexity", "score": 12.5, "source": "/data/t.jsonl"},
    ],
    "mean": 0.6,
}


def test_an_evaluation_becomes_a_model_index():
    read, _ = card(evaluation=EVALUATION)
    results = {result.dataset_name: result for result in read.data.eval_results}
    first = results["grade school"]
    assert (first.task_type, first.dataset_type, first.dataset_split) == ("text-generation", "openai/gsm8k", "test")
    assert (first.metric_type, first.metric_value) == ("exact_match", 0.625)
    assert results["my text"].dataset_type == "my-text"
    assert "/data" not in read.content
    assert "| grade school | exact_match | 62.5 % | 55.0 % to 70.0 % | 200 |" in read.text
    assert "| my text | perplexity | 12.500 |" in read.text


def test_the_repository_replaces_the_directory_where_the_card_loads_it():
    _, made = card()
    text = with_model_id(made.text, "me/my-merge")
    assert 'model_id = "me/my-merge"' in text and 'model_id = "."' not in text


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("family", ["vit", "t5-gated"])
def test_the_command_writes_a_card_that_loads_the_model(workspace, monkeypatch, family):
    folder = workspace(family)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    for method in ("neuro_merging", "ties"):
        (folder / "merge.yaml").write_text(configuration(method, parameters={"density": 0.5, "weight": 0.5}))
        done = run("merge", "merge.yaml", method, "--quiet", "--evaluation", "evaluation.json")
        assert (done.exit_code, done.stderr) == (0, "")
        read = huggingface_hub.ModelCard.load(folder / method / "README.md")
        assert len(read.data.eval_results) == 2
        snippet = read.text.split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(folder / method)
        loaded: dict = {}
        exec(snippet, loaded)
        assert type(loaded["model"]).__name__ == json.loads(Path("config.json").read_text())["architectures"][0]
        monkeypatch.chdir(folder)


def test_an_evaluation_that_is_none_is_refused_before_the_merge(workspace):
    folder = workspace("vit")
    (folder / "merge.yaml").write_text(configuration())
    (folder / "other.json").write_text('{"format": "something"}')
    for file, said in (("other.json", "not a file of the format"), ("gone.json", "cannot be read")):
        done = run("merge", "merge.yaml", "out", "--evaluation", file)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert said in done.stderr and not (folder / "out").exists()


def test_conflicting_licences_are_told_by_the_command(workspace):
    folder = workspace("vit")
    write_card(folder / "base", license="mit")
    write_card(folder / "expert-b", license="cc-by-nc-4.0")
    (folder / "merge.yaml").write_text(configuration())
    done = run("merge", "merge.yaml", "out", "--quiet")
    assert (done.exit_code, "different licences (base: mit; expert-b: cc-by-nc-4.0)" in done.stderr) == (0, True)


def test_data_sets_of_profiles_are_named_where_others_have_them(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from neuron_methods.profiling import Settings, measure_profile
    from tests.support import tiny

    profile = tmp_path / "p.safetensors"
    base, texts = tiny.save_model("llama", tmp_path / "base"), tiny.write_texts(tmp_path / "texts.jsonl", 8)
    measure_profile(str(base), [f"a={texts}"], profile, Settings(top=0))
    source = configuration(
        "min_merging",
        folder=tmp_path,
        models=[{"model": "org/a", "parameters": {"profile": str(profile)}}, {"model": "org/b"}],
    )
    assert card(source)[0].data.datasets is None, "a local file is nobody else's"
    with safe_open(profile, "pt") as file:
        metadata = file.metadata()
    metadata["profile"] = metadata["profile"].replace('"texts.jsonl"', '"openai/gsm8k@main:train"')
    save_file(load_file(profile), profile, metadata=metadata)
    assert card(source)[0].data.datasets == ["openai/gsm8k"]
    profile.unlink()
    assert card(source)[0].data.datasets is None
