"""The report of whole merges: the same while merging and afterwards, on every kind of output, and on its pages."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import click.testing
import huggingface_hub
import pytest
import torch
from PIL import Image

from neuron_methods.cli import main
from neuron_methods.methods.groups_file import groups_from_labels
from neuron_methods.sharing.card_sections import with_section
from neuron_methods.sharing.report.collect import place_of
from neuron_methods.sharing.report.drawing import DARK, LIGHT
from neuron_methods.sharing.report.pages import FIGURES, draw_figures
from tests.support.checkpoints import build, configuration, fine_tune, read, save


@pytest.fixture
def undrawn(monkeypatch):
    """The report without its pictures, where only the numbers are looked at: drawing takes seconds."""
    monkeypatch.setattr("neuron_methods.sharing.report.pages.draw_figures", lambda _document: [])


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, list(arguments))


def document(out: str) -> dict:
    return json.loads(Path(out, "report", "report.json").read_text())


def layers(found: dict) -> list[dict]:
    return [entry for entry in found["places"] if entry["layer"] is not None]


def write_groups(place: str) -> None:
    names = ["general", "a", "b"]
    labels = {f"layers.{i}": [names[n % 3] for n in range(24)] for i in range(2)}
    groups_from_labels("base", "llama", labels, {}).write(place)


def grouped(**keys: object) -> str:
    models = [{"model": f"expert-{g}", "parameters": {"group": g}} for g in "ab"]
    return configuration("neuron_merge", models=models, parameters={"groups": "groups.json"}, **keys)


@pytest.mark.parametrize(
    ("method", "own"), [("neuro_merging", "trim"), ("min_merging", "selection"), ("neuron_merge", "groups")]
)
def test_while_merging_and_afterwards_tell_the_same(workspace, undrawn, method, own):
    folder = workspace("llama-tied")
    write_groups("groups.json")
    (folder / "merge.yaml").write_text(grouped() if own == "groups" else configuration(method))
    done = run("merge", "merge.yaml", "during", "--quiet", "--report")
    assert done.exit_code == 0, done.output
    assert run("merge", "merge.yaml", "plain", "--quiet").exit_code == 0
    done = run("report", "plain", "--quiet")
    assert (done.exit_code, done.stdout) == (0, "plain/report/report.html\n"), done.output
    during, after = document("during"), document("plain")
    assert layers(during) == layers(after) != []
    assert {key for key in ("trim", "selection", "groups") if during[key]} == {own}
    assert during[own] == after[own]
    assert (Path("plain/model.safetensors")).read_bytes() == Path("during/model.safetensors").read_bytes()
    assert during["experts"] == ["expert-a", "expert-b"]
    (spec,) = [spec for spec in FIGURES if spec.name == own]
    assert spec.applies(during) and sum(spec.applies(during) for spec in FIGURES) == 7
    assert spec.draw(during, LIGHT).startswith(b"\x89PNG") and len(spec.describe(during)) > 60


def test_numbers_are_those_of_the_tensors(workspace, undrawn):
    workspace("llama-tied")
    Path("merge.yaml").write_text(
        configuration("task_arithmetic", parameters={"weight": 0.5}, base_model="base", dtype="float32")
    )
    assert run("merge", "merge.yaml", "out", "--quiet", "--report").exit_code == 0
    base, a, out = (read(Path(name)) for name in ("base", "expert-a", "out"))
    names = [name for name in base if name.startswith("model.layers.1.mlp") and base[name].ndim == 2]
    flat = [torch.cat([tensors[name].flatten() for name in names]).double() for tensors in (base, a, out)]
    (entry,) = [e for e in layers(document("out")) if (e["layer"], e["kind"]) == (1, "MLP")]
    norm = float(flat[0].norm())
    assert entry["relative_update"][0] == pytest.approx(float((flat[1] - flat[0]).norm()) / norm, rel=1e-4)
    assert entry["distances"][:2] == pytest.approx(
        [float((flat[2] - flat[0]).norm()) / norm, float((flat[2] - flat[1]).norm()) / norm], rel=1e-4
    )
    assert entry["neurons"] == 24 + 24 + 16


def test_an_adapter_has_a_report(workspace, undrawn):
    workspace("llama-tied")
    Path("merge.yaml").write_text(configuration())
    # Of full rank, so that the adapter holds all of the merge.
    assert run("merge", "merge.yaml", "out", "--quiet", "--as-adapter", "--rank", "16", "--report").exit_code == 0
    during = document("out")
    assert run("report", "out", "--quiet").exit_code == 0
    for one, other in zip(layers(during), layers(document("out")), strict=True):
        assert one["distances"] == pytest.approx(other["distances"], rel=1e-3)
    assert huggingface_hub.ModelCard.load("out/README.md").data.library_name == "peft"


@pytest.mark.parametrize(("family", "stacks"), [("t5-ungated", ["encoder", "decoder"]), ("clip", ["vision", "text"])])
def test_stacks_of_layers_are_kept_apart(workspace, undrawn, family, stacks):
    workspace(family)
    Path("merge.yaml").write_text(configuration())
    done = run("merge", "merge.yaml", "out", "--quiet", "--report")
    assert done.exit_code == 0, done.output
    found = layers(document("out"))
    assert list(dict.fromkeys(e["stack"] for e in found)) == stacks
    assert {(e["stack"], e["layer"]) for e in found} == {(s, i) for s in stacks for i in range(2)}
    assert {e["kind"] for e in found} >= {"attention", "MLP"}


def test_names_are_put_where_they_belong():
    assert place_of("model.layers.17.mlp.up_proj.weight") == ("layers", 17, "MLP")
    assert place_of("decoder.block.3.layer.1.EncDecAttention.q.weight") == ("decoder", 3, "attention")
    assert place_of("vision_model.encoder.layers.0.mlp.fc1.weight") == ("vision", 0, "MLP")
    assert place_of("text_model.encoder.layers.0.self_attn.q_proj.weight") == ("text", 0, "attention")
    assert place_of("vit.encoder.layer.2.attention.attention.query.weight") == ("encoder", 2, "attention")
    assert place_of("model.embed_tokens.weight") == ("", None, "embeddings")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A report of seven experts, more than there are colours and too many pairs for lines of their own."""
    folder = tmp_path_factory.mktemp("many")
    save(build("llama-tied"), folder / "base")
    models = []
    for index in range(7):
        save(fine_tune(build("llama-tied"), index), folder / f"e{index}" / "full")
        models.append({"model": str(folder / f"e{index}" / "full")})
    (folder / "merge.yaml").write_text(configuration(folder=folder, models=models))
    done = run("merge", str(folder / "merge.yaml"), str(folder / "out"), "--quiet", "--report")
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def drawn(many):
    return draw_figures(json.loads((many / "out/report/report.json").read_text()))


def test_figures_differ_by_theme_and_are_pictures(drawn):
    names = ["energy", "agreement", "important", "responses", "closest", "spectrum", "trim"]
    assert [one.spec.name for one in drawn] == names
    for one in drawn:
        for theme, content in ((LIGHT, one.light), (DARK, one.dark)):
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            assert picture.width > 1000 and picture.height > 200
            assert picture.getpixel((0, 0)) == tuple(bytes.fromhex(theme.background[1:]))
            assert len(picture.getcolors(1 << 20)) > 50
        assert len(one.text) > 60 and re.search(r"\d", one.text)


def test_the_page_needs_nothing_else(many):
    page = (many / "out/report/report.html").read_text()
    assert not re.search(r"""(src|srcset|href)=(?!"data:)""", page)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', page)
    dark = re.findall(r'<source media="\(prefers-color-scheme: dark\)" srcset="data:image/png;base64,([^"]+)">', page)
    assert len(images) == len(dark) == 7
    for (light, text), other in zip(images, dark, strict=True):
        assert light != other and len(text) > 60
        Image.open(io.BytesIO(base64.b64decode(light))).verify()


def test_no_path_of_this_machine_is_shown(many):
    for path in ("report/report.json", "report/report.html", "README.md"):
        text = (many / "out" / path).read_text()
        assert str(many) not in text and str(many.parent) not in text, path
    assert json.loads((many / "out/report/report.json").read_text())["experts"] == [f"e{i}" for i in range(7)]


def test_the_card_shows_every_figure_once_however_often_it_is_made(many, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("neuron_methods.sharing.report.pages.draw_figures", lambda _document: drawn)
    card = many / "out" / "README.md"
    first = card.read_text()
    links = re.findall(r"!\[([^\]]+)\]\(report/(\w+)\.png\)", first)
    assert len(links) == 7 and all((many / "out/report" / f"{name}.png").is_file() for _, name in links)
    evaluation = {
        "format": "mergekit-neuron-evaluation",
        "version": 1,
        "tasks": [{"name": "x", "kind": "generation", "metric": "exact_match", "score": 0.5}],
    }
    (tmp_path / "e.json").write_text(json.dumps(evaluation))
    card.write_text(first.replace("# out\n", "# My own title\n"))
    for _ in range(2):
        done = run("report", str(many / "out"), "--quiet", "--rows", "8", "--evaluation", str(tmp_path / "e.json"))
        assert done.exit_code == 0, done.output
    text = card.read_text()
    assert "# My own title" in text and "8 rows, drawn at random" in text
    assert len(re.findall(r"!\[", text)) == 7
    assert text.count("## What the merge does to the neurons") == text.count("## Evaluation") == 1
    read_back = huggingface_hub.ModelCard.load(card)
    assert len(read_back.data.eval_results) == 1
    assert read_back.data.tags == huggingface_hub.ModelCard(first).data.tags
    assert run("report", str(many / "out"), "--quiet", "--rows", "8", "--new-card").exit_code == 0
    assert "# out\n" in card.read_text()


def test_a_section_goes_in_without_touching_the_rest():
    card = "---\nx: 1\n---\n# T\n\nText.\n\n## How to load it\n\n```python\n## Not a heading\n```\n\n## End\n\nBye.\n"
    once = with_section(card, "## New\n\nOne.")
    assert once.index("## New") < once.index("## How to load it")
    assert once.replace("## New\n\nOne.\n\n", "") == card
    twice = with_section(once, "## New\n\nTwo.")
    assert twice == once.replace("One.", "Two.")
    assert with_section("# T\n", "## New\n\nOne.") == "# T\n\n## New\n\nOne.\n"
    assert with_section(card, "## Not a heading\n\nOne.").count("## Not a heading") == 2


def test_what_cannot_be_reported_is_refused_before_the_merge(workspace, monkeypatch):
    workspace("llama-tied")
    Path("linear.yaml").write_text(configuration("linear"))
    done = run("merge", "linear.yaml", "out", "--report")
    assert (done.exit_code, "name it as base_model" in done.stderr) == (1, True)
    Path("merge.yaml").write_text(configuration())
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("merge", "merge.yaml", "out", "--report")
    assert (done.exit_code, "pip install 'mergekit-neuron[report]'" in done.stderr) == (1, True)
    assert not Path("out").exists()


def test_errors_of_the_command(workspace, undrawn):
    workspace("llama-tied")
    Path("merge.yaml").write_text(configuration())
    assert run("merge", "merge.yaml", "out", "--quiet", "--no-write-model-card").exit_code == 0

    def refused(said: str, *arguments: str) -> None:
        done = run("report", *arguments, "--quiet")
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
        assert said in done.stderr

    refused("no such directory", "nothing")
    refused("--config FILE", "out")
    assert run("report", "out", "--config", "merge.yaml", "--quiet").exit_code == 0
    assert "## What the merge does to the neurons" in Path("out/README.md").read_text()
    Path("other.yaml").write_text(configuration(base_model="gone/base/x"))
    refused("no such directory", "out", "--config", "other.yaml")


def test_every_figure_has_words_and_no_two_share_a_file():
    assert len({spec.name for spec in FIGURES}) == len(FIGURES)
    assert all(spec.caption.endswith(".") and spec.title for spec in FIGURES)
