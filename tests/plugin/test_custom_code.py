"""Models that bring code of their own: with --trust-remote-code it goes along, without it nothing of it is run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import dynamic_module_utils

from tests.support.checkpoints import read
from tests.support.commands import begun, run
from tests.support.hub_cache import asked, cache, watched
from tests.support.tokenizers import save_tokenizer

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig
open("executed", "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper import FACTOR
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * FACTOR
        return found
""",
    "helper.py": "FACTOR = 2",
    "tokenization_own.py": """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
""",
}
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
OWN = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": MAP}
TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
WEIGHTS = {"base": 0.2, "expert-a": 0.5, "expert-b": 0.3}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Where commands keep modules of custom code."""
    place = tmp_path_factory.mktemp("modules")
    with begun(HF_MODULES_CACHE=str(place)):
        yield place


@pytest.fixture
def folder(workspace, monkeypatch, modules):
    folder = workspace("llama-tied")
    shutil.rmtree(modules, ignore_errors=True)
    monkeypatch.setenv("HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules-here"))
    monkeypatch.syspath_prepend(str(folder / "modules-here"))
    for name in WEIGHTS:
        save_tokenizer(folder / name, ["<unk>", *(f"w{i}" for i in range(39))])
        for file, text in CODE.items():
            (folder / name / file).write_text(text)
    (folder / "base" / "unneeded.py").write_text("")
    return folder


def change(folder, file, **keys):
    for name in WEIGHTS:
        content = json.loads((folder / name / file).read_text())
        (folder / name / file).write_text(json.dumps({**content, **keys}))


def merge(folder, *options, names=None, **environment):
    models = [{"model": (names or {}).get(n, n), "parameters": {"weight": w}} for n, w in WEIGHTS.items()]
    (folder / "merge.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    return run("mergekit-neuron", "merge", "merge.yaml", "out", *options, folder=folder, **environment)


def expected_logits(tokens):
    """Of a Llama whose weights are the mean of the three."""
    parts = {name: read(Path(name)) for name in WEIGHTS}
    mean = {key: sum(w * parts[name][key] for name, w in WEIGHTS.items()) for key in parts["base"]}
    config = {**json.loads(Path("base/config.json").read_text()), "model_type": "llama"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(mean, strict=False)
    model.tie_weights()
    return model.eval()(tokens).logits


def check_logits(factor, **options):
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained("out", **options).eval()
        torch.testing.assert_close(model(tokens).logits, factor * expected_logits(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("by", ["path", "cache"])
def test_the_code_goes_along_where_it_is_trusted(folder, by):
    change(folder, "config.json", **OWN)
    change(folder, "tokenizer_config.json", **TOKENIZER)
    names, environment = {}, watched(folder, folder / "home")
    if by == "cache":
        names = {name: f"org/{name}" for name in WEIGHTS}
        for name, repository in names.items():
            cache(folder / "home", repository, folder / name)
    done = merge(folder, "--trust-remote-code", names=names, **environment)
    assert done.returncode == 0, done.stderr
    assert asked(folder) == []
    assert {path.name: path.read_text() for path in Path("out").glob("*.py")} == CODE
    assert json.loads(Path("out/config.json").read_text())["auto_map"] == MAP
    check_logits(2, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained("out", trust_remote_code=True)
    assert (type(tokenizer).__name__, tokenizer.get_vocab()["w3"]) == ("OwnTokenizer", 4)


@pytest.mark.parametrize("config", [OWN, {**OWN, "model_type": "llama"}], ids=["config", "class"])
def test_without_trust_it_is_refused_before_anything_and_nobody_is_asked(folder, config):
    change(folder, "config.json", **config)
    done = merge(folder)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model base: its config.json names custom code")
    assert "--trust-remote-code" in line
    assert not (folder / "executed").exists()
    assert not (folder / "out").exists()


def test_a_tokenizer_of_custom_code_is_refused_without_trust(folder):
    change(folder, "tokenizer_config.json", **TOKENIZER)
    done = merge(folder)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: model base: its tokenizer is custom code, which is run only with --trust-remote-code"
    )


@pytest.mark.parametrize("trusted", [False, True])
def test_a_class_of_transformers_that_names_code_too_loads_either_way(folder, trusted):
    change(folder, "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama_own.LlamaForCausalLM"})
    for name in WEIGHTS:
        code = "import transformers\nclass LlamaForCausalLM(transformers.LlamaForCausalLM):\n    pass\n"
        (folder / name / "modeling_llama_own.py").write_text(code)
    done = merge(folder, *["--trust-remote-code"] * trusted)
    assert done.returncode == 0, done.stderr
    assert ("modeling_llama_own.py" in {path.name for path in Path("out").iterdir()}) is trusted
    assert ("auto_map of config.json is left out" in done.stdout) is not trusted
    check_logits(1)
    check_logits(1, trust_remote_code=True)


def test_code_that_is_named_and_not_there(folder):
    change(folder, "config.json", **OWN)
    (folder / "base" / "helper.py").unlink()
    done = merge(folder, "--trust-remote-code")
    assert done.returncode == 1
    assert "helper.py" in done.stderr
    assert "unexpected" not in done.stderr
