"""Which orderings of methods that are told elsewhere the zoos have; the zoos are small, and have tasks of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candidates import Candidate
from report import FAMILIES, Row, collect, complete

from neuron_methods.evaluation.comparing.statistics import paired_difference
from neuron_methods.support.files import write_text


@dataclass(frozen=True)
class Ordering:
    """One method above another, as a source has it.

    Attributes:
        above: the leaderboard's row that should score more.
        below: the row that should score less.
        claim: the two in words.
        source: where that stands.
        averages: in percent, of both there; empty where only the order is meant.
    """

    above: str
    below: str
    claim: str
    source: str
    averages: str = ""


_NEURO = "arXiv:2503.05320 (Fang et al., experiments)"
_UNTUNED = "T5-base 74.8, 73.6; T5-large 77.6, 76.7; ViT-B/32 76.4, 72.4; ViT-L/14 87.9, 86.0"
ORDERINGS = (
    Ordering("neuro_merging", "ties, untuned", "NeuroMerging, at our defaults, above TIES; untuned", _NEURO, _UNTUNED),
    Ordering(
        "neuro_merging, top 10 %",
        "ties, untuned",
        "NeuroMerging, as its script has it, above TIES; untuned",
        _NEURO,
        _UNTUNED,
    ),
    Ordering(
        "neuro_merging, λ₂ tuned",
        "ties",
        "NeuroMerging above TIES; tuned",
        _NEURO,
        "T5-base 77.5, 76.4; T5-large 82.2, 79.5; ViT-B/32 76.5, 73.6; ViT-L/14 88.3, 86.0",
    ),
    Ordering(
        "ties", "task_arithmetic", "TIES above task arithmetic; tuned", "arXiv:2306.01708 (Yadav et al., abstract)"
    ),
    Ordering(
        "TSV-M",
        "task_arithmetic",
        "TSV-M above task arithmetic; tuned",
        "arXiv:2412.00081 (Gargiulo et al., abstract)",
    ),
)
_MARGIN = 1.96


def write_orderings(results: Sequence[Mapping[str, Any]], out: Path, candidates: Sequence[Candidate]) -> None:
    """Write ``orderings.md`` from the results of all rows."""
    rows, references = collect(results, candidates)
    families = [family for family in FAMILIES if family in references["base"]]
    scored = {family: {row.name: row for row in complete(rows, references, family)} for family in families}
    write_text(out / "orderings.md", table(scored))


def table(scored: Mapping[str, Mapping[str, Row]]) -> str:
    """Lay out every ordering by family: the difference of the two rows, and whether it is the same.

    Args:
        scored: rows by name that are scored on all seeds, by family.
    """
    lines = [
        "Whether the zoos have the same order: yes, no, or level where the difference is within 1.96 standard "
        "errors of it, paired; and the difference in points.",
        "",
        f"| order | source | averages there | {' | '.join(FAMILIES[family] for family in scored)} |",
        "|---|---|---|" + "---|" * len(scored),
    ]
    for one in ORDERINGS:
        cells = []
        for family, rows in scored.items():
            if one.above in rows and one.below in rows:
                gap, error = paired_difference(rows[one.above].outcomes[family], rows[one.below].outcomes[family])
                cells.append(f"{verdict(gap, error)}, {100 * gap:+.1f} ± {100 * _MARGIN * error:.1f}")
            else:
                cells.append("–")
        lines.append(f"| {one.claim} | {one.source} | {one.averages or '–'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict(gap: float, error: float) -> str:
    """Say whether a difference with its standard error is one, and which way."""
    if abs(gap) <= _MARGIN * error:
        return "level"
    return "yes" if gap > 0 else "no"
