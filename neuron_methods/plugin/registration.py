"""Make our methods and architecture definitions known to mergekit, and show our methods the plan of a merge.

mergekit 0.1.5 has no plug-in discovery, and hands a method one tensor at a time without ever showing it the plan. What
has to be put into mergekit for that is put there here and nowhere else:

- names into the registry of methods, definitions into the table of architectures (`register`);
- `MergePlanner._plan` is followed by `planning.attach_to_planner` (`patch_planner`): mergekit-yaml, mergekit-multi,
  mergekit-evolve and the in-memory planner all pass there;
- `plan_flat_merge` of mergekit-pytorch is followed by `planning.attach_to_flat_merge` (`patch_raw_merge`).

All are idempotent and called by the start-up hook as soon as the module they concern is imported.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

_MARK = "_neuron_methods_patched"


def register() -> None:
    """Make the method names of this package known to mergekit in this process. Idempotent."""
    from mergekit.merge_methods import registry

    from neuron_methods import _autoload
    from neuron_methods.methods.neuro_merging import NeuroMerging
    from neuron_methods.plugin.architectures import register_architectures

    known = {method.spec.name for method in registry.registered_methods()}
    for method_class in (NeuroMerging,):
        if method_class.spec.name not in known:
            registry.register(method_class())
    register_architectures()
    _autoload.arm()


def patch_planner() -> None:
    """Let our methods see the plans that `MergePlanner` makes."""
    from neuron_methods.plugin.planning import attach_to_planner

    planner_class = sys.modules["mergekit.plan"].MergePlanner
    original = planner_class._plan
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def plan(self: Any) -> None:
        original(self)
        attach_to_planner(self)

    setattr(plan, _MARK, True)
    planner_class._plan = plan


def patch_raw_merge() -> None:
    """Let our methods see the plans of `mergekit-pytorch`."""
    from neuron_methods.plugin.planning import attach_to_flat_merge

    module = sys.modules["mergekit.scripts.merge_raw_pytorch"]
    original = module.plan_flat_merge
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def plan_flat_merge(config: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return attach_to_flat_merge(config, original(config, *args, **kwargs))

    setattr(plan_flat_merge, _MARK, True)
    module.plan_flat_merge = plan_flat_merge
