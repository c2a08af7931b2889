"""The start-up hook: lets mergekit's own commands know our methods, with nothing to type.

mergekit has no plug-in discovery, so it takes two steps, each as small as can be:

1. Installation puts `mergekit_neuron_autoload.pth` into the root of site-packages. Its one line, which is
   `PTH_CODE` below, runs whenever an interpreter starts and imports nothing: it leaves a finder in front of
   the import system that waits for the first import of `mergekit`, and then calls `arm()`.
   `MERGEKIT_NEURON_AUTOLOAD=0` prevents it.
2. `arm()` puts a `Hook` in front of the import system. Once one of the modules of mergekit in `CALLBACKS`,
   its registry of merge methods first among them, has been executed, it calls the function named there.

As this happens in other people's processes, nothing here ever raises, and nothing is printed unless a callback
fails: mergekit goes on as if we were not there, and as that may cost a merge some of its tensors, one line on stderr
says so. `failures()` gives the exceptions to `neuron_methods.register()` and our own commands, which end with them;
`MERGEKIT_NEURON_DEBUG=1` prints their tracebacks.
"""

import sys
from _thread import _local  # threading.local without importing threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Module of mergekit -> what to call once it has been executed, as "module:function", in the order of calling.
# A function that does not exist (yet) is passed over.
CALLBACKS = {
    "mergekit.merge_methods": "neuron_methods.plugin.patches:register_methods",
    "mergekit.architecture": "neuron_methods.plugin.patches:patch_architectures",
    "mergekit.io.tasks": "neuron_methods.plugin.patches:patch_loaders",
    "mergekit.config": "neuron_methods.plugin.patches:patch_configuration",
    "mergekit.plan": "neuron_methods.plugin.patches:patch_planner",
    "mergekit.merge": "neuron_methods.plugin.patches:patch_merge",
    "mergekit.scripts.merge_raw_pytorch": "neuron_methods.plugin.patches:patch_raw_merge",
}

# What the .pth file executes, there on a single line; a test keeps the two alike.
PTH_CODE = """\
class MergekitNeuronAutoload:
    def find_spec(self, name, path=None, target=None):
        if name == 'mergekit':
            try:
                from neuron_methods._autoload import arm
                arm(instead_of=self)
            except Exception:
                pass
if os.environ.get('MERGEKIT_NEURON_AUTOLOAD') != '0':
    sys.meta_path.insert(0, MergekitNeuronAutoload())
"""


class _Thread(_local):
    """Per thread: how many watched modules are being executed right now, one inside the other."""

    depth = 0


class Hook:
    """A finder for `sys.meta_path` that calls functions after certain modules have been executed.

    Callbacks wait until no watched module and no module of our own (`own` prefix) is half executed in the
    thread, so that they never meet a partly initialised module. `failures` has their exceptions, each with the
    function that raised it.
    """

    def __init__(self, callbacks: "Mapping[str, str]", own: str) -> None:
        self.callbacks = callbacks
        self.own = own
        self._executed: set[str] = set()
        self._pending: set[str] = set()
        self._thread = _Thread()
        self.failures: list[tuple[str, Exception]] = []

    def arm(self, instead_of: object = None) -> None:
        """Put the hook in front of the import system and serve the modules that are already imported.

        Args:
            instead_of: a finder that gives up its place on `sys.meta_path` to the hook.
        """
        finders = [finder for finder in sys.meta_path if finder is not instead_of]
        if self not in finders:
            finders.insert(0, self)
        sys.meta_path[:] = finders
        for name in self.callbacks:
            if name not in self._executed and _is_imported(name):
                self._executed.add(name)
                self._pending.add(name)
        if self._thread.depth == 0:
            self._run_pending()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Find a watched module with the finders after this one; None for every other module."""
        if fullname not in self.callbacks and not fullname.startswith(self.own):
            return None
        if self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Loader):
                    spec.loader = _Loader(spec.loader, self, fullname)
                return spec
        return None

    def execute(self, loader: object, module: "ModuleType", name: str) -> None:
        """Let `loader` execute `module`, then run the callbacks that became due."""
        self._thread.depth += 1
        try:
            loader.exec_module(module)  # type: ignore[attr-defined]
            if sys.modules.get(name) is module:  # otherwise it was executed aside, not imported
                _bind_to_package(module, name)
                if name in self.callbacks:
                    self._executed.add(name)
                    self._pending.add(name)
        finally:
            self._thread.depth -= 1
            if self._thread.depth == 0:
                self._run_pending()

    def _run_pending(self) -> None:
        self._thread.depth += 1  # what callbacks import adds to this loop instead of starting another
        try:
            postponed = set()
            while due := [name for name in self.callbacks if name in self._pending]:
                self._pending.discard(due[0])
                if not self._call(self.callbacks[due[0]]):
                    postponed.add(due[0])
            self._pending |= postponed
        finally:
            self._thread.depth -= 1

    def _call(self, target: str) -> bool:
        """Call the function; False where it needs a module that is only half executed, and has to wait."""
        try:
            from importlib import import_module

            module_name, _, function_name = target.partition(":")
            function = getattr(import_module(module_name), function_name, None)
            if function is not None:
                function()
        except Exception as error:
            if isinstance(error, ImportError) and not _is_imported(error.name or "") and error.name in sys.modules:
                return False
            self._fail(target, error)
            import os

            if os.environ.get("MERGEKIT_NEURON_DEBUG", "0") not in ("", "0"):
                import traceback

                traceback.print_exc()
        return True

    def _fail(self, target: str, error: Exception) -> None:
        """Keep the exception of a callback; tell of the first one, unless a command of ours is there to do so."""
        self.failures.append((target, error))
        if len(self.failures) == 1 and "neuron_methods.cli" not in sys.modules:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            from contextlib import suppress

            with suppress(Exception):  # stderr is closed, or None under pythonw
                sys.stderr.write(f"warning: mergekit goes without mergekit-neuron, or a part of it: {line}\n")


class _Loader:
    """Stands in for a module's loader until the module is executed, and then gives way to it.

    From then on `__loader__` and `__spec__.loader` are the ones the module would have had without us.
    """

    def __init__(self, loader: object, hook: Hook, name: str) -> None:
        self._loader = loader
        self._hook = hook
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(self._loader, attribute)

    def __reduce__(self) -> object:
        from copy import copy

        return copy, (self._loader,)  # pickled or copied, it is the loader it stands in for

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        create = getattr(self._loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: "ModuleType") -> None:
        spec = getattr(module, "__spec__", None)
        if getattr(spec, "loader", None) is self:
            spec.loader = self._loader  # type: ignore[union-attr]
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader  # type: ignore[assignment]
        self._hook.execute(self._loader, module, self._name)


def _bind_to_package(module: "ModuleType", name: str) -> None:
    """Make `package.module` work: the import system does so only after the module's loader has returned."""
    package, _, child = name.rpartition(".")
    try:  # noqa: SIM105 - contextlib would have to be imported
        setattr(sys.modules[package], child, module)
    except Exception:
        pass  # the import system will meet the same obstacle, and say so


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)


_hook = Hook(CALLBACKS, own="neuron_methods.")


def failures() -> "list[tuple[str, Exception]]":
    """What of mergekit could not be extended so far: the functions called, and their exceptions."""
    return _hook.failures


def arm(instead_of: object = None) -> None:
    """Watch mergekit's imports from now on, and catch up with those that have happened. Idempotent.

    Args:
        instead_of: the finder of `PTH_CODE`, which has done its duty.
    """
    _hook.arm(instead_of)
