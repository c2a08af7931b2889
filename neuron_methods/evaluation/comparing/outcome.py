"""What a comparison leaves: a table for the screen, YAMLs, JSON, a section for a card, and a page with the figure."""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuron_methods.evaluation.comparing.kept import FORMAT, SUMMARY, VERSION
from neuron_methods.evaluation.comparing.plot import draw_comparison
from neuron_methods.evaluation.comparing.statistics import Spread, paired_difference, spread
from neuron_methods.evaluation.comparing.study import Comparison, Row
from neuron_methods.evaluation.score_files import format_score
from neuron_methods.evaluation.tuning.plot import can_plot
from neuron_methods.evaluation.tuning.search import show_point
from neuron_methods.support.files import write_json, write_text
from neuron_methods.support.pages import page
from neuron_methods.support.text import columns, markdown

BEST, SECTION, PAGE, YAMLS = "best.yml", "compare.md", "compare.html", "yamls"
_LONGEST = 60  # characters of a YAML's name
_HEAD = ("model", "points", "validation", "test", "95 % interval", "to the best", "s per merge")


def cells(comparison: Comparison) -> list[tuple[str, ...]]:
    """Lay out rows as text: base, experts, then merges, the best on validation data first.

    The last column but one is the difference of the mean test score to that of the best merge, with the standard error
    of the paired difference.
    """
    tasks = [task["name"] for task in comparison.best.tasks]
    lines = [(*_HEAD, *tasks)]
    for row in [*(row for row in comparison.rows if row.kind != "merge"), *comparison.merges]:
        if row.failed:
            lines.append((row.name, "", "", "no merge", "", "", "", *("" for _ in tasks)))
            continue
        found = interval(row)
        lines.append(
            (
                row.name,
                str(row.points) if row.kind == "merge" else "",
                "" if row.validation is None else f"{100 * row.validation:.1f}",
                "" if row.mean is None else f"{100 * row.mean:.1f}",
                "" if found is None else f"{100 * found.low:.1f} to {100 * found.high:.1f}",
                difference(row, comparison.best),
                "" if row.merge_seconds is None else f"{row.merge_seconds:.1f}",
                *(format_score(task["score"], task["metric"]).removesuffix(" %") for task in row.tasks),
            )
        )
    return lines


def interval(row: Row) -> Spread | None:
    """Find the interval of a row's mean test score; None where it is no mean over examples."""
    return spread([row.outcomes]) if row.paired else None


def difference(row: Row, best: Row) -> str:
    """Write the paired difference to the best merge in points, with its standard error."""
    if row is best or not (row.paired and best.paired):
        return ""
    gap, error = paired_difference([row.outcomes], [best.outcomes])
    return f"{100 * gap:+.1f} ± {100 * error:.1f}"


def table(comparison: Comparison) -> list[str]:
    """Lay out lines for the screen."""
    rows = cells(comparison)
    lines = columns(rows, left=(0,))
    best = comparison.best
    chosen = f" at {show_point(best.point)}" if best.point else ""
    return [*lines, f"best on validation data ({comparison.objective}): {best.name}{chosen}"]


def section(comparison: Comparison) -> str:
    """Write the section for a card, in Markdown."""
    head, *rows = cells(comparison)
    lines = ["## Comparison", "", _about(comparison), "", f"| {' | '.join(map(markdown, head))} |"]
    lines.append("|" + "---|" * len(head))
    lines += [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    return "\n".join(
        [*lines, *(["", *(f"- {markdown(note)}" for note in comparison.notes)] if comparison.notes else [])]
    )


def _about(comparison: Comparison) -> str:
    best = comparison.best
    counts = {task["count"] for task in best.tasks}
    examples = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return (
        f"Test scores on {len(best.tasks)} tasks of {examples} examples; what is tuned had at most {comparison.budget} "
        f"points on validation data, which the best method was chosen by, too ({comparison.objective} over tasks). "
        "Intervals are bootstraps over examples; differences to the best are paired, with their standard errors."
    )


def document(comparison: Comparison) -> dict[str, Any]:
    """Say everything in JSON, but for the outcomes of single examples, which the rows' files hold."""
    yamls = yaml_names([row.name for row in comparison.merges])
    return {
        "format": FORMAT,
        "version": VERSION,
        "best": comparison.best.name,
        "objective": comparison.objective,
        "budget": comparison.budget,
        "seed": comparison.seed,
        "rows": [_record(row, comparison.best, yamls) for row in comparison.rows],
        "notes": comparison.notes,
    }


def _record(row: Row, best: Row, yamls: Mapping[str, str]) -> dict[str, Any]:
    found = interval(row)
    record: dict[str, Any] = {"name": row.name, "kind": row.kind, "tasks": row.tasks, "mean": row.mean}
    record["interval"] = None if found is None else [found.low, found.high]
    if row.paired and best.paired and row is not best:
        gap, error = paired_difference([row.outcomes], [best.outcomes])
        record["difference_to_best"] = {"points": gap, "standard_error": error}
    if row.kind == "merge":
        merged = ("method", "point", "points", "validation", "merge_seconds", "failed")
        record |= {key: getattr(row, key) for key in merged}
        record["yaml"] = None if row.failed else f"{YAMLS}/{yamls[row.name]}"
    return record


def yaml_names(names: Sequence[str]) -> dict[str, str]:
    """Name the YAML of each row: after its row, by a digest of that where it is long, or like another's."""
    plain = {name: re.sub(r"[^\w-]+", "-", name).strip("-").lower() for name in names}
    counts = Counter(plain.values())
    short = {
        name: each
        if counts[each] == 1 and len(each) <= _LONGEST
        else f"{each[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, each in plain.items()
    }
    return {name: f"{each}.yml" for name, each in short.items()}


def write_comparison(comparison: Comparison, out: Path) -> list[str]:
    """Write all files into the directory of a comparison.

    Returns:
        What the user should know: why there is no figure.
    """
    (out / YAMLS).mkdir(exist_ok=True)
    yamls = yaml_names([row.name for row in comparison.merges])
    for row in comparison.merges:
        if not row.failed:
            write_text(out / YAMLS / yamls[row.name], row.source)
    best = comparison.best
    note = f"# {best.name}: {comparison.objective} {best.validation:.4f} on validation data, the best of "
    write_text(out / BEST, f"{note}{len(comparison.merges)} methods\n{best.source}")
    write_text(out / SECTION, section(comparison) + "\n")
    pictures: Sequence[str] = draw_comparison(comparison.rows) if can_plot() else []
    write_text(out / PAGE, _page(comparison, pictures))
    write_json(out / SUMMARY, document(comparison), indent=1)
    if pictures:
        return []
    if can_plot():
        return ["no figure: it is of scores that are means over examples, and a task has none"]
    return ["no figure: it needs matplotlib: pip install 'mergekit-neuron[report]'"]


def _page(comparison: Comparison, pictures: Sequence[str]) -> str:
    head, *rows = cells(comparison)
    body = [f"<p>{html.escape(_about(comparison))}</p>", *pictures, '<div class="wide"><table>']
    body.append("<tr>" + "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in head) + "</tr>")
    for name, *others in rows:
        marked = ' class="best"' if name == comparison.best.name else ""
        cells_of_row = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        body.append(f"<tr{marked}><th scope=row>{html.escape(name)}</th>{cells_of_row}</tr>")
    body.append("</table></div>")
    body += [f"<p>{html.escape(note)}</p>" for note in comparison.notes]
    style = ".best * { font-weight: bold } .wide { overflow-x: auto } svg { max-width: 100%; height: auto }"
    return page("Which method for these models?", "\n".join(body), style)
