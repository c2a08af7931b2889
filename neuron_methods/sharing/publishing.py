"""A merge with what goes with it: card, report, and upload. What `mergekit-neuron merge` runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_methods.plugin.merging import CONFIG_NAME, Companion, MergeRun
from neuron_methods.sharing.card import CardOptions, make_card, read_evaluation


@dataclass(frozen=True)
class Extras:
    """What is asked for beside the merge.

    Attributes:
        report: draw the report, from what the merge sees of every tensor.
        evaluation: JSON of `mergekit-neuron evaluate` for the card.
    """

    report: bool = False
    evaluation: Path | None = None


def merge_companion(extras: Extras | None = None) -> Companion:
    """The companion that writes card and report beside what a merge writes.

    Raises:
        UserError: the evaluation cannot be read, or the report's drawing library is missing.
    """
    extras = extras or Extras()
    evaluation = read_evaluation(extras.evaluation) if extras.evaluation is not None else None

    def finish(run: MergeRun, staging: Path, name: str, _state: Any) -> list[str]:
        if not run.options.write_model_card:
            return []
        options = CardOptions(evaluation=evaluation, cache_dir=run.options.transformers_cache)
        card = make_card(run.configuration, run.source, name, staging, options)
        (staging / CONFIG_NAME).write_text(run.source, encoding="utf-8")
        (staging / "README.md").write_text(card.text, encoding="utf-8")
        return card.warnings

    return Companion(finish)
