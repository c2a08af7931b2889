"""The notebook, run cell by cell as it stands, with a Hub of this machine's own in the place of the Hub."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.sharing.hub_standin import hub, user
from tests.support.commands import SCRIPTS, environment

NOTEBOOK = Path(__file__).parents[2] / "examples/notebooks/merge.ipynb"
TOKEN = "hf_TestOnlyNotARealTokenXXXXXXXXXX"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Where the notebook has run, the notebook with what its cells printed, and the Hub's stand-in."""
    folder = tmp_path_factory.mktemp("notebook")
    with hub() as state, pytest.MonkeyPatch.context() as patch:
        state.users[TOKEN] = user("your-name")
        path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
        changes = {"HF_ENDPOINT": state.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        for key, value in environment(PATH=path, HF_HOME=str(folder / "hub"), **changes).items():
            patch.setenv(key, value)
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
        yield folder, notebook, state


def printed(notebook, beginning):
    """What the cells that begin so have printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(beginning)]
    assert cells
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout").strip()


def test_it_is_stored_without_outputs_in_ten_cells_that_are_each_explained():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and kinds.count("markdown") >= len(code)


def test_the_merge_does_what_both_adapters_do(ran):
    folder, notebook, _ = ran
    assert printed(notebook, "from transformers import Auto").splitlines()[-2:] == [
        "german house : Haus",
        "plural garden : gardens",
    ]
    scores = json.loads((folder / "merged.json").read_text())
    assert {task["name"]: task["score"] for task in scores["tasks"]} == {"german": 1.0, "plural": 1.0}
    assert printed(notebook, "answers = ").startswith("0 of 12 answers are wrong")


def test_a_dry_run_comes_first_and_the_report_is_shown(ran):
    _, notebook, _ = ran
    assert "memory to take" in printed(notebook, "!mergekit-neuron merge merge.yaml merged --dry-run")
    shown = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(shown) == 2


def test_the_last_cell_uploads_the_merge_and_nothing_else_is_asked_of_the_hub(ran):
    folder, notebook, state = ran
    assert printed(notebook, "!mergekit-neuron push").splitlines()[-1] == f"{state.url}/your-name/my-first-merge"
    repository = state.repositories["your-name/my-first-merge"]
    assert repository.private
    uploaded = state.files("your-name/my-first-merge")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(uploaded)
    assert str(folder).encode() not in b"".join(uploaded.values())
    assert not [
        path for _, path in state.asked if "my-first-merge" not in path and not path.startswith(("/api/", "/objects/"))
    ]
