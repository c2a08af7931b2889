"""Cards are garnish: whatever stands in a model's README, and whatever breaks of card or report, the merge is made."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from click.testing import CliRunner

from neuron_methods.cli import main
from neuron_methods.sharing import card, publishing
from tests.support.checkpoints import configuration, read

_BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)
#: Front matter of a README, or the whole of it as bytes.
READMES: dict[str, str | bytes] = {
    "licence a list": "license: [mit, apache-2.0]",
    "licence a number": "license: 3",
    "licence a mapping": "license: {a: b}",
    "licence a date": "license: 2024-01-01",
    "licence null": "license: null",
    "licence empty": "license: ''",
    "licence of lists": "license: [[1], [2]]",
    "licence of many lines": 'license: "a\\nb\\n---\\n# c"',
    "licence of markup": 'license: "<script>alert(1)</script> | [x](y) `z`"',
    "licence with a null character": 'license: "a\\0b"',
    "licence with an escape": 'license: "\\e[31mred"',
    "licence of a megabyte": "license: " + "x" * 1_000_000,
    "licence of aliases": "a: &a " + "x" * 100_000 + "\nlicense: [" + ", ".join(["*a"] * 1000) + "]",
    "name a number": "license: other\nlicense_name: 3\nlicense_link: [1]",
    "tags a number": "license: mit\ntags: 5",
    "datasets a number": "license: mit\ndatasets: 5",
    "no such date": "license: mit\nreleased: 2024-13-45",
    "keys twice": "license: mit\nlicense: mit",
    "keys that are lists": "? [a, b]\n: c\nlicense: mit",
    "a list": "- license",
    "text": "license",
    "broken": "license: [",
    "unknown tag": "license: !!python/object/apply:os.system ['touch executed']",
    "deep": "license: " + "[" * 5000 + "]" * 5000,
    "bomb": _BOMB + "license: mit",
    "an alias to itself": "a: &a [*a]\nlicense: mit",
    "model index": "license: mit\nmodel-index: 3",
    "base a mapping": "license: mit\nbase_model: {a: 3}",
    "huge": "license: mit\nx: " + "y" * 11_000_000,
    "never ends": b"---\n" + b"license: mit\n" * 300_000,
    "no UTF-8": b"---\nlicense: \xff\xfe\n---\n",
    "UTF-16": "---\nlicense: mit\n---\n".encode("utf-16"),
    "null characters": b"\0" * 100,
    "no front matter": b"# A model",
    "empty": b"",
    "dashes": b"---\n" * 1000,
}
#: What a README is instead of a file.
PLACES = {
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "link to itself": lambda place: place.symlink_to(place),
    "link to nothing": lambda place: place.symlink_to("nothing"),
    "device": lambda place: place.symlink_to("/dev/zero"),
}
CASES = [*READMES, *PLACES]


@pytest.fixture
def folder(workspace):
    signal.alarm(100)  # nothing here may be waited for
    yield workspace("llama-tied")
    signal.alarm(0)


def write(place: Path, case: str) -> None:
    if case in PLACES:
        PLACES[case](place)
    else:
        content = READMES[case]
        place.write_bytes(content if isinstance(content, bytes) else f"---\n{content}\n---\n# A model\n".encode())


def merge(*options: str):
    done = CliRunner().invoke(main, ["merge", "merge.yml", "out", "--force", *options])
    assert done.exit_code == 0, done.output
    assert "unexpected" not in done.output, done.output
    return done


def check_card(text: str) -> None:
    loaded = huggingface_hub.ModelCard(text)
    assert loaded.data.library_name == "transformers"
    assert "<script" not in loaded.text and "\x1b" not in text and "\0" not in text
    assert len(text) < 20_000


@pytest.mark.parametrize("cases", [CASES[i : i + 3] for i in range(0, len(CASES), 3)], ids=lambda c: ", ".join(c))
def test_no_readme_of_a_model_fails_a_merge(folder, cases):
    for name, case in zip(("base", "expert-a", "expert-b"), cases, strict=False):
        write(folder / name / "README.md", case)
    (folder / "merge.yml").write_text(configuration("task_arithmetic", parameters={"weight": 0.5}))
    merge("--quiet")
    assert not (folder / "executed").exists()
    check_card((folder / "out" / "README.md").read_text())


def test_what_cannot_be_read_is_told(folder):
    write(folder / "expert-a" / "README.md", "broken")
    (folder / "merge.yml").write_text(configuration("linear"))
    done = merge()
    assert "the licence of expert-a is not known: expert-a/README.md" in done.stdout


@pytest.mark.parametrize("name", ["a b", "it's", 'say "no"', "x`y`", "<b>", "a|b", "[x](y)", "a\nb", "$(x)", "ü"])
def test_no_name_of_a_model_fails_a_merge(folder, name):
    (folder / name).mkdir()
    for model in ("base", "expert-a", "expert-b"):
        shutil.move(folder / model, folder / name / model)
    shutil.move(folder / name / "expert-b", folder / name / name)
    models = [{"model": f"{name}/{model}"} for model in ("expert-a", name)]
    source = {"merge_method": "task_arithmetic", "base_model": f"{name}/base", "models": models}
    (folder / "merge.yml").write_text(yaml.safe_dump({**source, "parameters": {"weight": 0.5}}))
    merge("--quiet")
    check_card((folder / "out" / "README.md").read_text())


#: Whatever makes a card or a report, each broken by itself: (module, name, whether the card is minimal then).
PARTS = {
    "sources": (publishing.CardSources, "read", False),
    "card": (publishing, "make_card", True),
    "report": (publishing, "write_report", False),
    "document": (publishing, "document_of", False),
    "tensor": (publishing.Collector, "look", False),
    "licences": (card, "find_licences", False),
    "datasets": (card, "profiled_datasets", False),
    **{name: (card, name, True) for name in ("citation_of", "pipeline_tag", "loading_snippet", "heads_section")},
    **{name: (card, name, True) for name in ("reduced_yaml", "_method_section", "card_text", "_versions")},
}


@pytest.mark.parametrize("part", PARTS)
def test_nothing_of_a_card_that_breaks_fails_a_merge(folder, monkeypatch, part):
    (folder / "merge.yml").write_text(configuration("task_arithmetic", parameters={"weight": 0.5}))

    def broken(*_args, **_settings):
        raise RecursionError("broken")

    where, name, minimal = PARTS[part]
    monkeypatch.setattr(where, name, broken)
    done = merge(*["--report"] * (part in ("report", "document", "tensor")))
    assert "broken" in done.stdout and "complete and verified" in done.stdout
    text = (folder / "out" / "README.md").read_text()
    check_card(text)
    assert ("## Method" in text) is not minimal
    assert not (folder / "out" / "report").exists()
    assert (folder / "out" / "mergekit_config.yml").exists() and read(folder / "out")
