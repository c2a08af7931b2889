"""The model card of a merge: what was merged and how, with front matter that the Hub understands.

A card is made of what the YAML says and of what lies beside the weights; no network is asked. Made again by
`mergekit-neuron report`, it keeps what `CardOptions` does not change.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registry
from pydantic import Field

from neuron_methods import __version__
from neuron_methods.methods.parameters import OwnMethodSpec
from neuron_methods.plugin.seam import models_in_order
from neuron_methods.sharing.card_sections import card_text, own_section, with_section
from neuron_methods.sharing.citations import CITATIONS, MERGEKIT, Citation
from neuron_methods.sharing.licences import Licences, find_licences
from neuron_methods.sharing.model_names import ModelNames, parts_of, reduced_yaml
from neuron_methods.sharing.settings import own_choices, profiled_datasets
from neuron_methods.sharing.snippets import heads_section, loading_snippet, pipeline_tag
from neuron_methods.support.documents import Foreign, front_matter, read_json, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import first_line, markdown

MERGEKIT_URL = "https://github.com/arcee-ai/mergekit"
_PACKAGES = ("mergekit", "transformers", "torch", "peft", "safetensors")
# Kinds of `mergekit-neuron evaluate` -> tasks of the Hub, where they are called otherwise.
_TASK_TYPES = {
    "text-to-text": "text2text-generation",
    "generation": "text-generation",
    "perplexity": "text-generation",
    "lm-eval": "text-generation",
}


@dataclass(frozen=True)
class CardSources:
    """What a card takes from files of the models, which others have written: licences, and data of profiles."""

    licences: Licences = field(default_factory=Licences)
    datasets: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls, configuration: MergeConfiguration, cache_dir: str | None = None, known: Collection[str] | None = None
    ) -> CardSources:
        """Read what there is; what cannot be read is told in `licences.unread`. `known` is as in `is_hub_id`."""
        models = list(dict.fromkeys(models_in_order(configuration)))
        licences = find_licences(parts_of(models), ModelNames(configuration, known).labels, cache_dir)
        return cls(licences, profiled_datasets(configuration))


@dataclass(frozen=True)
class CardOptions:
    """What a card holds beside the merge itself.

    Attributes:
        report_section: Markdown with the report's figures.
        evaluation: an evaluation, as `read_evaluation` gives it.
        known_hub: ids of the Hub among the models, where an earlier card tells; see `names.is_hub_id`.
        sources: what the models' files say, where it was read before; else it is read now.
    """

    report_section: str | None = None
    evaluation: dict[str, Any] | None = None
    known_hub: Collection[str] | None = None
    sources: CardSources | None = None


@dataclass
class Card:
    """A card and what the user should know about it."""

    text: str
    warnings: list[str] = field(default_factory=list)


def make_card(
    configuration: MergeConfiguration, source: str, name: str, place: Path, options: CardOptions | None = None
) -> Card:
    """Write the card of a merge.

    Args:
        configuration: of the merge.
        source: the YAML's text.
        name: what the result is called.
        place: directory of the result; what lies there tells a model from an adapter.
        options: see `CardOptions`.
    """
    options = options or CardOptions()
    names = ModelNames(configuration, options.known_hub)
    models = list(dict.fromkeys(models_in_order(configuration)))
    adapter = (place / "adapter_config.json").exists()
    sources = options.sources or CardSources.read(configuration, None, options.known_hub)
    licences = sources.licences
    citation = citation_of(configuration.merge_method)
    bases = names.hub
    if adapter and configuration.base_model is not None:
        bases = [path for path in bases if path == configuration.base_model.model.path]
    data = huggingface_hub.ModelCardData(
        base_model=bases or None,
        base_model_relation=("adapter" if adapter else "merge") if bases else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=pipeline_tag(place),
        tags=["mergekit", "merge", "mergekit-neuron", configuration.merge_method, *(["lora"] if adapter else [])],
        datasets=sources.datasets or None,
        license=licences.inherited.id if licences.inherited else None,
        license_name=licences.inherited.name if licences.inherited else None,
        license_link=licences.inherited.link if licences.inherited else None,
        model_name=name if options.evaluation else None,
        eval_results=_eval_results(options.evaluation) if options.evaluation else None,
        ignore_metadata_errors=True,
    )
    sections = [
        f"# {markdown(name)}",
        _opening(configuration, names, models, adapter),
        *_licence_section(licences),
        _method_section(citation, configuration),
        *([options.report_section.strip()] if options.report_section else []),
        *([_evaluation_section(options.evaluation)] if options.evaluation else []),
        f"## How to load it\n\n{loading_snippet(place)}",
        *([heads] if (heads := heads_section(place)) else []),
        f"## Configuration\n\n```yaml\n{reduced_yaml(source.strip(), names)}\n```",
        f"Made with {_versions()}.",
        f"## Citation\n\n```bibtex\n{chr(10).join(c.bibtex for c in (citation, MERGEKIT) if c.bibtex)}\n```",
    ]
    return Card(card_text(data, sections), [*([licences.conflict] if licences.conflict else []), *licences.unread])


def minimal_card(name: str, adapter: bool) -> str:
    """Write a card that says no more than what this is, for where nothing else can be said."""
    front = f"---\nlibrary_name: {'peft' if adapter else 'transformers'}\ntags: [mergekit, merge, mergekit-neuron]\n---"
    return f"{front}\n\n# {markdown(name)}\n\nA merge, made with mergekit and mergekit-neuron {__version__}.\n"


_Score = Annotated[float, Field(ge=float("-inf"))]  # a perplexity may be infinite, no score is NaN


class _Prompts(Foreign):
    """How a task's prompts were made."""

    chat: bool = False
    template: str | None = None
    system: str | None = None
    few_shot: int | None = Field(None, ge=0)


class _Task(Foreign):
    """What a card tells of a task."""

    name: str
    kind: str
    metric: str
    score: _Score
    low: _Score | None = None
    high: _Score | None = None
    count: int | None = Field(None, ge=0)
    source: str | None = None
    split: str | None = None
    hub: bool | None = None
    prompts: _Prompts | None = None


class _Evaluation(Foreign):
    """What a card tells of the JSON of `mergekit-neuron evaluate`."""

    tasks: list[_Task]


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read the JSON of `mergekit-neuron evaluate`.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    from neuron_methods.evaluation.score_files import FORMAT, VERSION

    again = "name a JSON that `mergekit-neuron evaluate -o` wrote"
    content = read_json(path, "--evaluation", format=FORMAT, version=VERSION, again=again)
    return validated(content, _Evaluation, f"--evaluation {path}", again).model_dump()


def citation_of(method: str) -> Citation:
    """Find what there is to say of a method; of one that is not in our table, what mergekit knows of it."""
    if method in CITATIONS:
        return CITATIONS[method]
    spec = registry.get(method).spec
    return Citation(spec.pretty_name or spec.name, "It is described where the link leads.", None, "")


def with_model_id(card: str, repository: str) -> str:
    """Put the id of its repository into the card's lines that load the model."""
    return re.sub(r'^model_id = ".*?".*$', f'model_id = "{repository}"', card, flags=re.MULTILINE)


def parsed_card(card: str, shown: str) -> huggingface_hub.ModelCard:
    """Take a card apart into front matter and text.

    Raises:
        UserError: its front matter cannot be read; `shown` is for the message.
    """
    front_matter(card, shown)
    try:
        return huggingface_hub.ModelCard(card, ignore_metadata_errors=True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"its front matter is none of a card ({first_line(error)})"
        raise UserError(f"{shown}: {problem}; mend it, or write the card anew with --new-card") from None


def with_evaluation(card: str, evaluation: dict[str, Any], name: str) -> str:
    """Put an evaluation into the card: into its front matter as model-index, and as a section."""
    read = parsed_card(with_section(card, _evaluation_section(evaluation)), f"the card of {name}")
    read.data.model_name = name
    read.data.eval_results = _eval_results(evaluation)
    return str(read)


def _opening(configuration: MergeConfiguration, names: ModelNames, models: list[ModelReference], adapter: bool) -> str:
    method = citation_of(configuration.merge_method)
    url = _url_of(configuration.merge_method)
    linked = f"[{method.name}]({url})" if url else method.name
    what = "This LoRA adapter is the update of a merge" if adapter else "This is a merge of fine-tuned models"
    base = configuration.base_model
    on_base = f" on the base {names.markdown(base)}" if base is not None else ""
    opening = f"{what} by {linked}{on_base}, made with [mergekit]({MERGEKIT_URL}) and mergekit-neuron."
    return "\n".join([opening, "", "Merged:", "", *(f"- {names.markdown(model)}" for model in models if model != base)])


def _licence_section(licences: Licences) -> list[str]:
    if licences.conflict is None:
        return []
    found = "\n".join(f"> - {markdown(model)}: {markdown(str(licence))}" for model, licence in licences.found.items())
    return [
        "> [!WARNING]\n> The merged models are under different licences, so this card names none. Find out what holds "
        f"before you use or share the merge.\n>\n{found}"
    ]


def _url_of(method: str) -> str:
    source = citation_of(method).source
    return source.url if source is not None else registry.get(method).spec.reference_url or ""


def _method_section(citation: Citation, configuration: MergeConfiguration) -> str:
    spec = registry.get(configuration.merge_method).spec
    parts = [f"## Method: {citation.name}", citation.text]
    if citation.source is not None:
        parts.append(f"[{citation.source.line}]({citation.source.url})")
    elif spec.reference_url:
        parts.append(spec.reference_url)
    if isinstance(spec, OwnMethodSpec):
        parts.append(own_section(own_choices(configuration, spec), spec.source, spec.kin))
    return "\n\n".join(filter(None, parts))


def _eval_results(evaluation: dict[str, Any]) -> list[huggingface_hub.EvalResult]:
    return [
        huggingface_hub.EvalResult(
            task_type=_TASK_TYPES.get(task["kind"], task["kind"]),
            dataset_type=_source_name(task),
            dataset_name=task["name"],
            dataset_split=task.get("split"),
            metric_type=task["metric"],
            metric_value=round(float(task["score"]), 6),
            dataset_args={key: value for key, value in (task.get("prompts") or {}).items() if value is not None}
            or None,
        )
        for task in evaluation["tasks"]
    ]


def _source_name(task: dict[str, Any]) -> str:
    """The data's id where it is on the Hub, else the task's name: a local path is nobody else's business."""
    source = str(task.get("source") or "")
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    local = source.rpartition(".")[2] in ("jsonl", "json", "parquet", "csv", "tsv", "txt", "gz")
    there = local or source.startswith("data/") or os.path.exists(source)
    known = task["hub"] if task.get("hub") is not None else hub and not there
    return source if known else re.sub(r"[^\w.-]+", "-", str(task["name"]))


def _evaluation_section(evaluation: dict[str, Any]) -> str:
    from neuron_methods.evaluation.score_files import format_score

    rows = []
    for task in evaluation["tasks"]:
        score, low, high = (
            "" if task.get(key) is None else format_score(task[key], task["metric"]) for key in ("score", "low", "high")
        )
        interval = f"{low} to {high}" if low and high else ""
        count = "" if task.get("count") is None else task["count"]
        how = _prompts_shown(task.get("prompts") or {})
        rows.append(
            f"| {markdown(task['name'])} | {markdown(task['metric'])} | {score} | {interval} | {count} | {how} |"
        )
    head = "| task | metric | score | 95 % interval | examples | prompts |\n|---|---|---|---|---|---|"
    return f"## Evaluation\n\n{head}\n" + "\n".join(rows)


def _prompts_shown(prompts: dict[str, Any]) -> str:
    said = []
    if prompts.get("chat"):
        said.append("chat template" + (", system prompt" if prompts.get("system") else ""))
    if count := prompts.get("few_shot"):
        said.append(f"{count} shown")
    return ", ".join(said)


def _versions() -> str:
    packages = (f"{package} {version(package)}" for package in _PACKAGES)
    return ", ".join([f"mergekit-neuron {__version__}", *packages, f"Python {platform.python_version()}"])
