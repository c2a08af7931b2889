"""A profile in readable form: what was measured, a layer's most active neurons, what drives one neuron; inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from neuron_methods.methods.inputs_file import FORMAT, InputsFile
from neuron_methods.neurons.profile_file import Exemplar, NeuronProfile
from neuron_methods.support.text import columns, format_bytes, listed


def describe_profile(profile: NeuronProfile) -> Iterator[str]:
    """Describe the model, the sources, and each layer in a line: how active it is, how many neurons never fire."""
    info = profile.info
    total = sum(profile.layers.values())
    yield f"model      {info.model} ({info.model_type}): {total} MLP neurons in {len(profile.layers)} layers"
    yield f"settings   {', '.join(f'{key} {value!r}' for key, value in info.settings.items())}"
    for name, source in info.sources.items():
        tokens = sorted(set(source.tokens.values()))
        count = " / ".join(str(number) for number in tokens)
        yield f"source     {name}: {source.samples} samples, {count} tokens of {source.source}"
    rows = [["layer", "neurons", *(f"{name}: mean |a|, never fire" for name in profile.sources)]]
    for layer, neurons in profile.layers.items():
        cells = []
        for source in profile.sources:
            mean = profile.statistic("mean_abs", source, layer).mean()
            silent = int((profile.statistic("firing_rate", source, layer) == 0).sum())
            cells.append(f"{mean:.4g}, {silent}")
        rows.append([layer, str(neurons), *cells])
    yield ""
    yield from columns(rows)


def describe_layer(profile: NeuronProfile, layer: str, count: int = 10) -> Iterator[str]:
    """List for each source the layer's `count` neurons of the largest mean |activation|."""
    layer = profile.find_layer(layer, f"--layer {layer}")
    for source in profile.sources:
        mean = profile.statistic("mean_abs", source, layer)
        yield f"{layer}, {source}: most active of {len(mean)} neurons ({profile.tokens(source, layer)} tokens)"
        rows = [["neuron", *profile.info.statistics, "strongest exemplar"]]
        for neuron in mean.topk(min(count, len(mean))).indices.tolist():
            values = [f"{profile.statistic(name, source, layer)[neuron]:.4g}" for name in profile.info.statistics]
            best = profile.exemplars(source, layer, neuron)[:1]
            rows.append([str(neuron), *values, _shown(best[0]) if best else ""])
        yield from columns(rows, left=(0, len(rows[0]) - 1))
        yield ""


def describe_neuron(profile: NeuronProfile, layer: str, neuron: int) -> Iterator[str]:
    """Describe one neuron: its statistics on every source, and the tokens that drive it furthest, marked »so«."""
    layer = profile.find_layer(layer, f"--layer {layer}")
    exemplars = {source: profile.exemplars(source, layer, neuron) for source in profile.sources}
    fires = "the gate is open" if layer in profile.info.gated else "the activation is positive"
    yield f"{layer}, neuron {neuron} of {profile.layers[layer]} (fires: {fires})"
    rows = [["source", *profile.info.statistics]]
    for source in profile.sources:
        values = [f"{profile.statistic(name, source, layer)[neuron]:.4g}" for name in profile.info.statistics]
        rows.append([source, *values])
    yield from columns(rows)
    for source, found in exemplars.items():
        yield ""
        yield f"{source}:" if found else f"{source}: no token activates it"
        for exemplar in found:
            place = "" if "image" in exemplar.text else f", position {exemplar.position}"
            yield f"  {exemplar.activation:>10.4g}  {_shown(exemplar)}  (row {exemplar.row}{place})"


def opened_inputs(path: Path) -> InputsFile | None:
    """Open a file of inputs; None where a file is none, whatever else it is."""
    if not path.is_file():  # safetensors waits for a pipe
        return None
    try:
        with safe_open(path, "pt") as file:
            is_one = (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return None
    return InputsFile.open(str(path)) if is_one else None


def describe_inputs(file: InputsFile) -> Iterator[str]:
    """Describe the model, where its inputs come from, and each factor in a line, with the modules that share it."""
    info = file.info
    modules: dict[str, list[str]] = {}
    for path, factor in info.modules.items():
        modules.setdefault(factor, []).append(path)
    size = sum(2 * file.rows(factor) * file.width(factor) for factor in modules)
    shown = f"{len(modules)} factors of {len(info.modules)} modules' inputs, {format_bytes(size)}"
    yield f"model      {info.model} ({info.model_type}): {shown}"
    made = info.made_from
    if isinstance(made.get("settings"), dict):
        yield f"settings   {', '.join(f'{key} {value!r}' for key, value in made['settings'].items())}"
    if isinstance(made.get("sources"), dict) and isinstance(made.get("samples"), dict):
        for name, source in made["sources"].items():
            yield f"source     {name}: {made['samples'].get(name)} samples of {source[0]}"
    yield ""
    rows = [["factor", "rows", "inputs", "tokens", "lost at most", "modules"]]
    for factor, paths in modules.items():
        numbers = file.rows(factor), file.width(factor), info.tokens[factor]
        rows.append([factor, *map(str, numbers), f"{info.lost.get(factor, 0.0):.2g}", listed(paths)])
    yield from columns(rows, left=(0, len(rows[0]) - 1))


def in_context(text: Mapping[str, str]) -> str:
    """Show a token in its text, marked »so«, in one line; `text` is an exemplar's."""
    token = text["token"].lstrip(" ") or text["token"]
    blank = " " * (len(text["token"]) - len(token))
    shown = f"{text['before']}{blank}»{token}«{text['after']}"
    return shown.replace("\n", "⏎").replace("\t", " ")


def _shown(exemplar: Exemplar) -> str:
    text = exemplar.text
    return f"{text['image']}, patch {exemplar.position}" if "image" in text else in_context(text)
