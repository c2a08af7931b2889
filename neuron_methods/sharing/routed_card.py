"""The model card of a routed model, for one that comes without."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from neuron_methods.routing.own_choices import own_choices
from neuron_methods.routing.routed_files import RoutedConfig, RoutedExpert
from neuron_methods.sharing.card_sections import card_text, own_section
from neuron_methods.sharing.citations import CITATIONS
from neuron_methods.sharing.snippets import loading_snippet
from neuron_methods.support.sources import LIANG
from neuron_methods.support.text import listed


def make_routed_card(place: Path, name: str, base_model: str) -> str:
    """Write the card of what `mergekit-neuron route` wrote, whose base has this id on the Hub.

    Raises:
        UserError: routed_config.json is damaged.
    """
    config = RoutedConfig.read(place)
    citation = CITATIONS["min_merging"]
    data = huggingface_hub.ModelCardData(
        base_model=[base_model],
        base_model_relation="merge",
        library_name="mergekit-neuron",
        tags=["mergekit-neuron", "merge", "min_merging", "routed", "lora"],
    )
    sections = [
        f"# {name}",
        f"A routed model: adapters on [{base_model}](https://huggingface.co/{base_model}), and a router that tells "
        f"from each input which of them it needs, after [{citation.name}]({LIANG.url}); made with mergekit-neuron. An "
        "input that no expert claims goes to the plain base model.",
        "\n".join(["Experts:", "", *map(_told, config.experts)]),
        own_section(own_choices(config), LIANG),
        f"## How to load it\n\n{loading_snippet(place)}",
        f"## Citation\n\n[{LIANG.line}]({LIANG.url})\n\n```bibtex\n{citation.bibtex}\n```",
    ]
    return card_text(data, sections)


def _told(expert: RoutedExpert) -> str:
    line = f"- {expert.name}, without {len(expert.redundant_layers)} layers"
    if expert.head_labels is None:
        return line
    return f"{line}, with a head for {len(expert.head_labels)} labels: {listed(expert.head_labels, 10)}"
