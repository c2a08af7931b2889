"""The start-up hook, on stand-ins for mergekit and for the registration module.

`Hook` itself is exercised in this process on throw-away modules; the `.pth` line and `arm()` in
interpreters of their own (`-I -S`: nothing of this environment), whose only site directory holds the real
hook and made-up packages.
"""

import importlib
import importlib.util
import inspect
import json
import os
import pickle
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from textwrap import dedent

import pytest

import neuron_methods
from neuron_methods._autoload import CALLBACKS, PTH_CODE, Hook

PACKAGE = Path(neuron_methods.__file__).parent
WARNING = "warning: mergekit goes without mergekit-neuron, or a part of it: "
PTH = PACKAGE / "mergekit_neuron_autoload.pth"


def write_modules(folder, sources):
    for name, source in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source), encoding="utf-8")


# --- Hook, in this process

FAKE_TABLE = {
    "fakekit.registry": "fakeours.callbacks:register",
    "fakekit.tasks": "fakeours.callbacks:patch_later",
    "fakekit.plan": "fakeours.callbacks:patch_plan",
}


@pytest.fixture
def fakekit(tmp_path, monkeypatch):
    """A package `fakekit` to watch and a package `fakeours` that records calls in `fakeours.calls`."""
    write_modules(
        tmp_path,
        {
            "fakekit/__init__.py": "",
            "fakekit/registry.py": "METHODS = ['linear']\n",
            "fakekit/tasks.py": "",
            "fakekit/other.py": "",
            "fakekit/plan.py": "from fakekit import registry, tasks\ndef planner():\n    return 'planner'\n",
            "fakekit/broken.py": "from fakekit import registry\nraise RuntimeError('no good')\n",
            "fakeours/__init__.py": "calls = []\n",
            "fakeours/callbacks.py": """
                import fakeours

                def register():
                    import fakekit.registry
                    fakekit.registry.METHODS.append('ours')
                    fakeours.calls.append('register')

                def patch_plan():
                    import fakekit.plan
                    fakekit.plan.planner
                    fakeours.calls.append('patch_plan')
            """,
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("fakekit", "fakeours"):
            del sys.modules[name]


@pytest.fixture
def hook(fakekit):
    hook = Hook(FAKE_TABLE, own="fakeours.")
    hook.arm()
    return hook


def calls():
    return importlib.import_module("fakeours").calls


def test_callback_runs_once_after_the_registry_is_executed(hook):
    import fakekit.registry

    assert fakekit.registry.METHODS == ["linear", "ours"]
    assert calls() == ["register"]


def test_other_imports_touch_nothing(hook):
    import fakekit.other  # noqa: F401

    assert "fakeours" not in sys.modules


def test_callbacks_run_in_the_order_of_the_table_and_after_the_outermost_import(hook):
    # plan imports the registry first; `register` must not see plan half executed, nor run after `patch_plan`.
    import fakekit.plan  # noqa: F401

    assert calls() == ["register", "patch_plan"]


def test_a_missing_function_is_passed_over(hook, capfd, monkeypatch):
    monkeypatch.setenv("MERGEKIT_NEURON_DEBUG", "1")
    import fakekit.registry
    import fakekit.tasks  # noqa: F401

    assert calls() == ["register"]
    assert capfd.readouterr() == ("", "")


def test_arming_serves_modules_imported_before(fakekit):
    import fakekit.plan

    hook = Hook(FAKE_TABLE, own="fakeours.")
    hook.arm()
    assert calls() == ["register", "patch_plan"]
    assert fakekit.plan.registry.METHODS == ["linear", "ours"]


def test_arming_is_idempotent(hook):
    import fakekit.registry

    hook.arm()
    hook.arm()
    assert fakekit.registry.METHODS == ["linear", "ours"]
    assert sum(finder is hook for finder in sys.meta_path) == 1


def test_a_callback_may_arm_again(fakekit):
    write_modules(
        fakekit,
        {
            "fakeours/callbacks.py": """
                import fakeours

                def register():
                    fakeours.calls.append('register')
                    fakeours.hook.arm()
            """
        },
    )
    import fakeours

    fakeours.hook = Hook(FAKE_TABLE, own="fakeours.")
    fakeours.hook.arm()
    import fakekit.registry

    assert calls() == ["register"]


def test_callbacks_wait_for_our_own_modules(fakekit):
    # The registry is first imported by a module of ours that the callback's module needs complete.
    write_modules(
        fakekit,
        {
            "fakeours/method.py": "import fakekit.registry\nMETHOD = 'ours'\n",
            "fakeours/callbacks.py": """
                import fakeours
                from fakeours.method import METHOD

                def register():
                    fakeours.calls.append(METHOD)
            """,
        },
    )
    Hook(FAKE_TABLE, own="fakeours.").arm()
    import fakeours.method  # noqa: F401

    assert calls() == ["ours"]


def test_the_callbacks_module_may_import_the_registry_itself(fakekit):
    write_modules(
        fakekit,
        {
            "fakeours/callbacks.py": """
                import fakekit.plan
                import fakeours

                def register():
                    fakeours.calls.append('register')

                def patch_plan():
                    fakeours.calls.append('patch_plan')
            """
        },
    )
    Hook(FAKE_TABLE, own="fakeours.").arm()
    import fakeours.callbacks  # noqa: F401

    assert calls() == ["register", "patch_plan"]


def test_a_watched_module_keeps_its_own_loader(hook):
    import fakekit.plan

    assert type(fakekit.plan.__loader__) is SourceFileLoader
    assert fakekit.plan.__spec__.loader is fakekit.plan.__loader__
    assert "def planner" in inspect.getsource(fakekit.plan)
    assert inspect.getsource(fakekit.plan.planner).startswith("def planner")
    assert pickle.loads(pickle.dumps(fakekit.plan.__spec__)) == fakekit.plan.__spec__


def test_a_spec_found_but_not_executed_behaves_as_the_original(hook):
    spec = importlib.util.find_spec("fakekit.registry")
    assert spec.loader.get_source("fakekit.registry").startswith("METHODS")
    assert spec.loader.get_filename() == spec.origin
    assert type(pickle.loads(pickle.dumps(spec)).loader) is SourceFileLoader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.METHODS == ["linear"]  # what the callback changes is the imported module, not this copy


def test_lazy_loader_on_top(hook):
    spec = importlib.util.find_spec("fakekit.registry")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fakekit.registry"] = module
    spec.loader.exec_module(module)
    assert module.METHODS[0] == "linear"
    assert type(module.__spec__.loader) is SourceFileLoader


def test_reload_executes_again_and_calls_again(hook):
    import fakekit.registry

    fakekit.registry.METHODS.append("lost by the reload")
    importlib.reload(fakekit.registry)
    assert fakekit.registry.METHODS == ["linear", "ours"]
    assert calls() == ["register", "register"]


def test_an_import_that_fails_fails_as_without_us(fakekit):
    table = {**FAKE_TABLE, "fakekit.broken": "fakeours.callbacks:patch_plan"}
    Hook(table, own="fakeours.").arm()
    with pytest.raises(RuntimeError, match="no good"):
        importlib.import_module("fakekit.broken")
    assert "fakekit.broken" not in sys.modules
    assert calls() == ["register"]  # the registry, which was imported on the way, stays imported


def test_a_module_that_does_not_exist(hook, fakekit):
    (fakekit / "fakekit" / "registry.py").unlink()
    with pytest.raises(ModuleNotFoundError, match=r"fakekit\.registry"):
        importlib.import_module("fakekit.registry")


@pytest.mark.parametrize("debug", ["", "0", "1"])
def test_a_failing_callback_costs_mergekit_one_line(fakekit, capfd, monkeypatch, debug):
    monkeypatch.delitem(sys.modules, "neuron_methods.cli", raising=False)
    write_modules(fakekit, {"fakeours/callbacks.py": "def register():\n    1 / 0\n\n\npatch_later = register\n"})
    monkeypatch.setenv("MERGEKIT_NEURON_DEBUG", debug)
    Hook(FAKE_TABLE, own="fakeours.").arm()
    import fakekit.registry

    assert fakekit.registry.METHODS == ["linear"]
    import fakekit.tasks

    out, err = capfd.readouterr()
    assert out == ""
    told, *rest = err.splitlines()
    assert told == f"{WARNING}ZeroDivisionError: division by zero"
    assert ("Traceback" in err) if debug == "1" else rest == []


# --- the .pth line, in interpreters of their own


@pytest.fixture
def site(tmp_path):
    """A site directory with the real hook, a registration that records calls, and a made-up mergekit."""
    targets = [target.partition(":") for target in CALLBACKS.values()]
    recorders = {}
    for module, _, function in targets:
        file = f"{module.replace('.', '/')}.py"
        head = "import sys\nsys.our_calls = getattr(sys, 'our_calls', [])\n"
        body = f"def {function}(): sys.our_calls.append({function!r})\n"
        recorders[file] = recorders.get(file, head) + body
    write_modules(
        tmp_path,
        {
            PTH.name: PTH.read_text(encoding="utf-8"),
            "neuron_methods/__init__.py": (PACKAGE / "__init__.py").read_text(encoding="utf-8"),
            "neuron_methods/_autoload.py": (PACKAGE / "_autoload.py").read_text(encoding="utf-8"),
            "neuron_methods/plugin/__init__.py": "",
            **recorders,
            "mergekit/__init__.py": "",
            "mergekit/architecture/__init__.py": "",
            "mergekit/common.py": "",
            "mergekit/io/__init__.py": "",
            "mergekit/io/tasks.py": "import mergekit.architecture",
            "mergekit/merge_methods/__init__.py": "",
            "mergekit/plan.py": "import mergekit.io.tasks, mergekit.merge_methods",
            "mergekit/scripts/__init__.py": "",
            "mergekit/scripts/merge_raw_pytorch.py": "import mergekit.merge_methods, mergekit.io.tasks",
        },
    )
    return tmp_path


def run_python(site, code, warned=False, **environment):
    """Run `code` in an interpreter whose only site directory is `site`; return its variable `report`.

    Nothing is said on stderr, unless `warned`: then one line.
    """
    script = f"import sys, site; site.addsitedir({str(site)!r})\nreport = None\n{dedent(code)}\n"
    script += "import json; print(json.dumps(report))"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MERGEKIT_NEURON_")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", script],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if warned:
        (warning,) = done.stderr.splitlines()
        assert warning.startswith(WARNING)
    else:
        assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_pth_is_one_import_line():
    (line,) = PTH.read_text(encoding="utf-8").splitlines()
    assert line.startswith("import ")  # anything else in a .pth file is taken for a path


def test_pth_is_the_documented_code():
    assert PTH.read_text(encoding="utf-8") == f"import os, sys; exec({PTH_CODE!r})\n"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("mergekit.common", []),
        ("mergekit.merge_methods", ["register_methods"]),
        ("mergekit.architecture", ["patch_architectures"]),
        ("mergekit.io.tasks", ["patch_architectures", "patch_loaders"]),
        ("mergekit.plan", ["register_methods", "patch_architectures", "patch_loaders", "patch_planner"]),
        (
            "mergekit.scripts.merge_raw_pytorch",
            ["register_methods", "patch_architectures", "patch_loaders", "patch_raw_merge"],
        ),
    ],
)
def test_start_up_hook_acts_on_import(site, module, expected):
    assert run_python(site, f"import {module}\nreport = getattr(sys, 'our_calls', [])") == expected


def test_start_up_imports_nothing(site):
    with_hook = run_python(site, "report = sorted(sys.modules)")
    (site / PTH.name).write_text("import os, sys\n", encoding="utf-8")
    assert with_hook == run_python(site, "report = sorted(sys.modules)")


def test_the_registry_costs_no_more_than_the_hook_and_the_registration(site):
    code = "import importlib, mergekit.merge_methods\nreport = sorted(sys.modules)"
    with_hook = set(run_python(site, code))
    without_hook = set(run_python(site, code, MERGEKIT_NEURON_AUTOLOAD="0"))
    assert with_hook - without_hook == {
        "neuron_methods",
        "neuron_methods._autoload",
        "neuron_methods.plugin",
        "neuron_methods.plugin.patches",
    }


def test_one_finder_stands_in_front_before_and_after_mergekit_is_imported(site):
    code = "report = [type(f).__name__ for f in sys.meta_path if not isinstance(f, type)]"
    assert run_python(site, code) == ["MergekitNeuronAutoload"]
    assert run_python(site, "import mergekit\n" + code) == ["Hook"]


def test_switched_off(site):
    code = """
        import mergekit.plan
        report = [hasattr(sys, 'our_calls'), [f for f in sys.meta_path if not isinstance(f, type)]]
    """
    assert run_python(site, code, MERGEKIT_NEURON_AUTOLOAD="0") == [False, []]
    code = "report = [name for name in sys.modules if name.startswith('neuron_methods')]"
    assert run_python(site, code, MERGEKIT_NEURON_AUTOLOAD="0") == []


def test_arm_by_hand_when_switched_off(site):
    code = "import mergekit.plan\nfrom neuron_methods._autoload import arm\narm(); arm()\nreport = sys.our_calls"
    expected = ["register_methods", "patch_architectures", "patch_loaders", "patch_planner"]
    assert run_python(site, code, MERGEKIT_NEURON_AUTOLOAD="0") == expected


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("neuron_methods/__init__.py", "raise RuntimeError('broken')"),
        ("neuron_methods/__init__.py", None),
        ("neuron_methods/_autoload.py", "def ("),
        ("neuron_methods/_autoload.py", "\0"),
        ("neuron_methods/_autoload.py", ""),
        ("neuron_methods/_autoload.py", None),
        ("neuron_methods/plugin/patches.py", "raise RuntimeError('broken')"),
        ("neuron_methods/plugin/patches.py", "def register_methods(): raise RecursionError('broken')"),
        ("neuron_methods/plugin/patches.py", "def ("),
        ("neuron_methods/plugin/patches.py", None),
        ("neuron_methods/plugin/__init__.py", "import does_not_exist"),
    ],
)
def test_a_broken_installation_is_harmless_and_told_of_where_a_merge_may_suffer(site, file, content):
    if content is None:
        (site / file).unlink()
    else:
        (site / file).write_text(content, encoding="utf-8")
    code = "import mergekit.plan\nreport = 'mergekit works'"
    assert run_python(site, code, warned=file.startswith("neuron_methods/plugin/")) == "mergekit works"
