"""What the demo prints: a table of scores, example answers, the YAML, and where everything is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuron_methods.demo.questions import DemoTask
from neuron_methods.evaluation.comparing.statistics import Spread, spread
from neuron_methods.support.text import columns

#: Held-out examples shown per task.
SHOWN = 2

_LONGER = """

Train longer, and ask every expert all tasks, a few minutes:
  mergekit-neuron demo --full"""


@dataclass(frozen=True)
class DemoReport:
    """The outcome of the demo; `str` of it is what the command prints.

    `scores` are of ``base``, each ``expert-TASK`` and ``merge``: per task that it was asked, ``scores`` (1 or 0) and
    ``answers``, one per held-out example; `full`: whether experts were asked all tasks. `seconds` is what each stage
    took when it was done.
    """

    full: bool
    out: Path
    tasks: list[DemoTask]
    scores: dict[str, dict[str, dict[str, Any]]]
    merge_yaml: str
    merge_summary: str
    seconds: dict[str, float]

    def table(self) -> str:
        """Lay out base, experts and merge by tasks and their mean, in percent of held-out examples."""
        rows = [("", *(task.name for task in self.tasks), "mean")]
        for model, by_task in self.scores.items():
            cells = [str(spread_of(by_task, [task.name])) if task.name in by_task else "–" for task in self.tasks]
            rows.append((model, *cells, "–" if "–" in cells else str(spread_of(by_task, by_task))))
        return "\n".join(columns(rows))

    def comparison(self) -> str:
        """Say in a line how the merge does beside the experts, each on its own task, and the base."""
        experts = {task.name: self.scores[f"expert-{task.name}"][task.name] for task in self.tasks}
        compared = (experts, self.scores["merge"], self.scores["base"])
        own, merge, base = (spread_of(by_task, by_task) for by_task in compared)
        return f"Mean over tasks: experts {own} %, each on its own; merge {merge} %, on all of them; base {base} %."

    def examples(self) -> str:
        """Show the first held-out examples of each task, with what base, expert and merge answered."""
        lines = []
        for task in self.tasks:
            lines.append(f"{task.name} ({task.title})")
            for number, example in enumerate(task.held_out[:SHOWN]):
                lines.append("  " + example.prompt.replace("\n", " | "))
                lines.append(f"    {'right':8} {example.answer}")
                for label, model in (("base", "base"), ("expert", f"expert-{task.name}"), ("merge", "merge")):
                    answer = self.scores[model][task.name]["answers"][number]
                    lines.append(f"    {label:8} {answer if answer else '(an empty line)'}")
        return "\n".join(lines)

    def times(self) -> str:
        """Add up seconds per kind of stage, and in all."""
        kinds: dict[str, float] = {}
        for stage, seconds in self.seconds.items():
            kind = stage.split()[0].rstrip(":")
            kinds[kind] = kinds.get(kind, 0.0) + seconds
        kinds["total"] = sum(self.seconds.values())
        return ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in kinds.items())

    def __str__(self) -> str:
        count = len(self.tasks[0].held_out)
        out = self.out
        return f"""\
Exact answers to {count} held-out examples of each task, in percent (95 % intervals):

{self.table()}

{self.comparison()}

Example answers:

{self.examples()}

The merge ({out / "merge.yaml"}):

{_indent(self.merge_yaml)}
{_indent(self.merge_summary)}

Written to {out}:
  base                      the base model, bf16 safetensors
  data                      the tasks' training and held-out examples
  experts/TASK/adapter      each expert as a LoRA adapter (peft)
  experts/TASK/full         each expert as a full model
  inputs                    what each expert's layers are given on examples of its task
  merged                    the merged model
  scores                    every answer of every model
  report.txt                this report

Time per stage: {self.times()}.

Merge again with other settings:
  mergekit-neuron merge {out / "merge.yaml"} OUT{"" if self.full else _LONGER}"""


def spread_of(by_task: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> Spread:
    """Average the scores of tasks, with the 95 % interval; `str` of it is in percent."""
    return spread([{name: np.array(by_task[name]["scores"]) for name in names}])


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())
