"""What an installation does to mergekit's own commands, in fresh virtual environments, and what removing it leaves.

The heavy dependencies are lent to the new environments by a directory of symbolic links to everything in the
running interpreter's site-packages but this project; a `.pth` path line makes it importable without processing
the `.pth` files in it. So whatever the new environment knows of this project comes from the installation.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import neuron_methods

ROOT = Path(__file__).parents[2]
PTH = "mergekit_neuron_autoload.pth"

STOCK_COMMANDS = {  # as mergekit's own metadata defines them
    "mergekit-yaml": "mergekit.scripts.run_yaml",
    "mergekit-multi": "mergekit.scripts.multimerge",
    "mergekit-pytorch": "mergekit.scripts.merge_raw_pytorch",
}


def call(*args, check=True, cwd=None, **environment):
    """Run a program without what the calling environment says about Python or about us."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MERGEKIT_NEURON_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, env=env, cwd=cwd, check=False)
    if check:
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def lent_packages(tmp_path_factory):
    """A directory of links to the installed packages, without this project and without any `.pth` file."""
    folder = tmp_path_factory.mktemp("lent")
    for site_packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site_packages).iterdir():
            name = entry.name.lower()
            if "mergekit_neuron" in name or name == "neuron_methods" or name.endswith(".pth"):
                continue
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_package_and_the_hook_and_nothing_else(built):
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
        roots = {name.split("/")[0] for name in names}
        metadata = f"mergekit_neuron-{neuron_methods.__version__}.dist-info"
        assert roots == {"neuron_methods", PTH, metadata}
        assert f"{metadata}/licenses/LICENSE" in names
        assert archive.read(PTH) == (ROOT / "neuron_methods" / PTH).read_bytes()
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "neuron_methods").rglob("*.py")}
        assert sources <= set(names)
        recipes = {f"neuron_methods/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yml")}
        assert {name for name in names if name.endswith(".yml")} == recipes != set()
        documents = [name for name in names if name.endswith(".md")]
        assert documents == ["neuron_methods/recipes/README.md"], "what `help` shows, and nothing else"


class Environment:
    """A virtual environment that can import the lent packages."""

    def __init__(self, folder, lent_packages):
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site_packages = Path(
            call(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        )
        (self.site_packages / "lent_packages.pth").write_text(f"{lent_packages}\n", encoding="utf-8")

    def pip(self, *args):
        return call(sys.executable, "-m", "pip", "--python", self.python, *args)

    def run(self, command, *args, **kwargs):
        """Run one of mergekit's commands the way its console script does."""
        code = f"import sys; from {STOCK_COMMANDS[command]} import main; sys.exit(main())"
        return call(self.python, "-c", code, *args, **kwargs)

    def listing(self):
        return {
            str(path.relative_to(self.site_packages))
            for path in self.site_packages.rglob("*")
            if "__pycache__" not in path.parts
        }


@pytest.fixture(params=["wheel", "editable"], scope="module")
def installed(request, built, lent_packages, tmp_path_factory):
    """An environment with this project installed; its listing before is in `before`."""
    environment = Environment(tmp_path_factory.mktemp(request.param) / "venv", lent_packages)
    environment.before = environment.listing()
    what = [built] if request.param == "wheel" else ["--no-build-isolation", "-e", ROOT]
    environment.pip("install", "--no-deps", "--no-index", *what)
    return environment


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three tiny Llamas, `base`, `a` and `b`, in one folder: config.json and model.safetensors each."""
    folder = tmp_path_factory.mktemp("models")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (32, 16),
        f"{layer}.self_attn.q_proj.weight": (16, 16),
        f"{layer}.self_attn.k_proj.weight": (8, 16),
        f"{layer}.self_attn.v_proj.weight": (8, 16),
        f"{layer}.self_attn.o_proj.weight": (16, 16),
        f"{layer}.mlp.gate_proj.weight": (24, 16),
        f"{layer}.mlp.up_proj.weight": (24, 16),
        f"{layer}.mlp.down_proj.weight": (16, 24),
        f"{layer}.input_layernorm.weight": (16,),
        f"{layer}.post_attention_layernorm.weight": (16,),
        "model.norm.weight": (16,),
        "lm_head.weight": (32, 16),
    }
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for expert in ("base", "a", "b"):
        weights = (
            base
            if expert == "base"
            else {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        )
        (folder / expert).mkdir()
        save_file(weights, folder / expert / "model.safetensors", metadata={"format": "pt"})
        (folder / expert / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = "merge_method: neuro_merging\nbase_model: ./{0}\ndtype: float32\nmodels:\n- model: ./{1}\n- model: ./{2}\n"
    files = [f"{name}/model.safetensors" for name in ("base", "a", "b")]
    (folder / "merge.yaml").write_text(recipe.format("base", "a", "b"), encoding="utf-8")
    (folder / "flat.yaml").write_text(recipe.format(*files), encoding="utf-8")
    multi = f"name: merged\n{recipe.format('base', 'a', 'b')}"
    (folder / "multi.yaml").write_text(multi, encoding="utf-8")
    return folder


ARGUMENTS = {
    "mergekit-yaml": ("merge.yaml", "{out}", "--no-copy-tokenizer"),
    "mergekit-multi": ("multi.yaml", "--intermediate-dir", "{out}", "--no-copy-tokenizer"),
    "mergekit-pytorch": ("flat.yaml", "{out}"),
}


def merges(installed, command, models, out):
    """Run one of the stock commands and compare what it wrote with the base."""
    installed.run(command, *(argument.format(out=out) for argument in ARGUMENTS[command]), cwd=models)
    (merged,) = out.rglob("*.safetensors")
    base, merged = load_file(models / "base" / "model.safetensors"), load_file(merged)
    assert merged.keys() == base.keys()
    return not torch.equal(merged["lm_head.weight"], base["lm_head.weight"])


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
@pytest.mark.parametrize("command", STOCK_COMMANDS)
def test_stock_commands_merge_after_installing_the_wheel(installed, models, tmp_path, command):
    assert merges(installed, command, models, tmp_path / "out")


@pytest.mark.parametrize("installed", ["editable"], indirect=True)
def test_stock_command_merges_after_an_editable_install(installed, models, tmp_path):
    assert merges(installed, "mergekit-yaml", models, tmp_path / "out")


LOOK_UP = "import mergekit.merge_methods as methods; methods.get('neuro_merging')"


@pytest.mark.parametrize(("value", "known"), [("0", False), ("1", True)])
def test_the_switch(installed, value, known):
    done = call(installed.python, "-c", LOOK_UP, check=False, MERGEKIT_NEURON_AUTOLOAD=value)
    assert (done.returncode == 0) is known
    assert known or "Unimplemented merge method neuro_merging" in done.stderr


def test_the_command_is_installed(installed):
    command = installed.python.with_name("mergekit-neuron")
    assert call(command, "--version").stdout == f"mergekit-neuron, version {neuron_methods.__version__}\n"


def test_uninstalling_leaves_nothing_behind(installed):
    assert (installed.site_packages / PTH).exists()
    installed.pip("uninstall", "-y", "mergekit-neuron")
    assert installed.listing() == installed.before
    assert not installed.python.with_name("mergekit-neuron").exists()
    done = call(installed.python, "-c", LOOK_UP, check=False)
    assert "Unimplemented merge method neuro_merging" in done.stderr
