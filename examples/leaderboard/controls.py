"""Does grouping by function beat random groups? Rows of `neuron_merge` with other groups in the place of the tasks'.

Random groups have the sizes that the classification by activations gives, in every layer; what they differ in is which
neurons are whose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from candidates import Candidate
from report import FAMILIES, Row

from neuron_methods.evaluation.comparing.statistics import paired_difference

#: Seeds of random groups.
DRAWS = 5
_RANDOM = "random groups"
_TUNED = ", tuned"


def controls(experts: int, labels: Path | None = None) -> list[Candidate]:
    """List the rows for a zoo with so many experts.

    Args:
        experts: how many.
        labels: a file that `mergekit-neuron groups --import` takes; without one there is no row for it.
    """
    kinds: dict[str, dict[str, Any]] = {"groups by activations": {"by": "activations"}}
    kinds |= {f"{_RANDOM}, draw {seed}": {"by": f"random {seed}"} for seed in range(DRAWS)}
    kinds["all general"] = {"by": "general"}
    if labels is not None:
        digest = hashlib.sha256(labels.read_bytes()).hexdigest()
        kinds["groups by labels"] = {"by": str(labels), "digest": digest}

    def row(
        name: str, kind: dict[str, Any], settings: Sequence[dict[str, Any]], scales: tuple[float, ...]
    ) -> Candidate:
        return Candidate(name, "ours", "neuron_merge", tuple({**one, **kind} for one in settings), scales)

    defaults = {"threshold": 0.6, "in_group": 1.0, "out_group": 0.0, "general": 0.5}
    shares = {"threshold": 0.3, "general": 1.0, "out_group": 1.0}
    tuned = [{"in_group": value, **shares} for value in (experts / 2, float(experts))]
    few = tuple(round(x / experts, 4) for x in (1.0, 1.75, 2.5, 4.0))
    rows = [row(name, kind, [defaults], (1.0,)) for name, kind in kinds.items()]
    return rows + [row(f"{name}{_TUNED}", kind, tuned, few) for name, kind in kinds.items()]


def against_random(rows: Sequence[Row], everyone: Sequence[Row], family: str) -> list[str]:
    """Tell how groups stand to the mean of random ones, with a 95 % interval.

    The interval is of examples drawn anew, in pairs, and of as many random groups drawn anew.

    Args:
        rows: scored on all seeds of the family.
        everyone: all; not used.
        family: of `FAMILIES`.
    """
    lines = []
    for tuned in (False, True):
        own = [row for row in rows if row.name.endswith(_TUNED) == tuned]
        drawn = [row.outcomes[family] for row in own if row.name.startswith(_RANDOM)]
        if not drawn:
            continue
        # Per seed of the zoo, task and example: the share of draws that are right.
        mean = [
            {name: np.mean([one[name] for one in ones], axis=0) for name in ones[0]}
            for ones in zip(*drawn, strict=True)
        ]
        scores = [100 * float(np.mean([v.mean() for one in each for v in one.values()])) for each in drawn]
        spread = float(np.var(scores, ddof=1)) / len(scores) if len(scores) > 1 else 0.0
        scored = f"which score {min(scores):.1f} to {max(scores):.1f}" if len(scores) > 1 else f"at {scores[0]:.1f}"
        for row in own:
            if row.name.startswith(_RANDOM):
                continue
            gap, error = paired_difference(row.outcomes[family], mean)
            half = 1.96 * float(np.sqrt((100 * error) ** 2 + spread))
            lines.append(
                f"- {FAMILIES[family]}: {row.name.removesuffix(_TUNED)}{_TUNED if tuned else ', at the defaults'}, "
                f"{100 * gap:+.1f} points ({100 * gap - half:+.1f} to {100 * gap + half:+.1f}) from the mean of "
                f"{len(scores)} draw{'s' if len(scores) > 1 else ''} of random groups, {scored}."
            )
    return lines
