"""The lists of a config that have one entry per layer, such as `layer_types`, follow the layers of slices.

mergekit 0.1.5 sets the number of layers and leaves these lists as the base has them: a layer then gets the kind of
attention of whichever layer was in its place, and where the number changes, transformers 5 refuses to save the config,
after the merge.
"""

from __future__ import annotations

from typing import Any

#: Lists of the numbers of layers.
_NUMBERS = ("mlp_only_layers",)


def move_layer_lists(planner: Any) -> None:
    """Let the lists of a planner's output config say of each layer what they say where it comes from.

    Args:
        planner: mergekit's `MergePlanner` after planning.
    """
    trust, config = planner.options.trust_remote_code, planner.config
    donor = config.base_model or config.referenced_models()[0]
    for name, module in config.modules.items():
        key = planner.arch_info.modules[name].architecture.num_layers_config_key()
        if key is None:
            continue
        *path, depth_key = key.split(".")
        origins = []
        for output in module.slices:
            chosen = next((s for s in output.sources if s.model == donor), output.sources[0])
            origins += [(chosen.model, index) for index in range(*chosen.layer_range)]
        sections = {model: _section(model.config(trust), path) for model in {donor, *(m for m, _ in origins)}}
        written, depth = _section(planner.out_model_config, path), getattr(sections[donor], depth_key)
        for attribute, value in vars(sections[donor]).items():
            if not isinstance(value, (list, tuple)) or attribute.endswith("token_id"):
                continue
            lists = {model: getattr(section, attribute, None) or () for model, section in sections.items()}
            if attribute in _NUMBERS:
                setattr(written, attribute, [at for at, (m, index) in enumerate(origins) if index in lists[m]])
            elif len(value) == depth and all(index < len(lists[m]) for m, index in origins):
                setattr(written, attribute, [lists[m][index] for m, index in origins])


def _section(config: Any, path: list[str]) -> Any:
    for part in path:
        config = getattr(config, part)
    return config
