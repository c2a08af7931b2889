"""`mergekit-neuron evaluate`: score a model on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neuron_methods.cli.common import DTYPES, PLACE, SEED, Count, debug_option, options, places, quiet_option, say

EPILOG = """\b
MODEL is a directory, a repository of the hub, an adapter, base+adapter, or a routed model's directory.

\b
TASKS.yml:
  tasks:
    - name: digits
      kind: image-classification
      data: {source: data/digits, split: test}  # path relative to this file, or a hub id
      columns: {image: image, label: label}
      labels: [0, 1, 2]                         # only among these
    - name: sums
      kind: generation
      data: {source: sums.jsonl, split: '[:200]'}
      columns: {input: prompt, target: answer}
      max_new_tokens: 8
      stop: "\\n"
      limit: 100
kinds and what they read (columns) and take (settings); each: name, kind, data, columns, metric,
batch_size, limit:
  image-classification             image, label     labels, head
  zero-shot-image-classification   image, label     labels, prompts    CLIP
  text-to-text                     input, target    max_new_tokens, stop, max_length
  generation                       input, target    the same, and those of a chat
  multiple-choice                  input, choices, label   normalize (none, tokens), separator, chat
  perplexity                       text (input)     max_length, chat
  text-classification              text, label (pair)      labels, head, max_length
  lm-eval                          -                task, num_fewshot, chat  (extra lm-eval)
head: the expert of a routed model whose numbers the labels are, where the data does not name them

\b
Metrics of texts: exact_match, token_f1, numeric_match (the last number), rouge_l, bleu and chrf
(extra metrics), pass_at_1 (target holds Python tests; needs --allow-code-execution). extract: a
regular expression; its group, or all it finds, is the answer. Else accuracy, or perplexity.
few_shot: N shows N examples of the validation split first (separator stands before an answer).

\b
Chat models: chat: true sends prompts through the model's chat template, as its user's turn; an
answer ends where the model's turn does. system: TEXT is said before, template: FILE is used instead
of the model's. Without them prompts go as the data has them, which lm-evaluation-harness does, too:
these are different scores, and the table and OUT.json say which.

\b
Examples:
  mergekit-neuron evaluate ./merged --task tasks.yml
  mergekit-neuron evaluate ./base+./adapter --task tasks.yml --limit 100 -o adapter.json
  accelerate launch --multi_gpu --num_processes 4 -m neuron_methods evaluate ./merged \\
      --task tasks.yml

\b
Beside OUT.json there is OUT.examples.jsonl with every example's score, prediction and target.
"""


#: What is scored, and how: of `evaluate` and of `tune`.
task_options = options(
    click.option("--task", "tasks", required=True, type=PLACE, metavar="TASKS.yml", help="File of tasks."),
    click.option("--only", multiple=True, metavar="NAME", help="This task of the file alone; may be repeated."),
    click.option("--limit", type=Count(), help="Examples per task at most."),
    click.option("--batch-size", type=Count(), help="Instead of the tasks' own."),
    click.option("--dtype", type=DTYPES, default="auto", show_default=True, help="auto: as stored; float32 on a CPU."),
    click.option("--allow-code-execution", is_flag=True, help="Run programs that the model writes (metric pass_at_1)."),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Of draws, intervals and searches."),
    quiet_option(),
)

#: Of `tune` and `compare`, whose merges are made from one YAML.
head_option = click.option(
    "--head",
    metavar="base|EXPERT|drop",
    help="Merge the bodies alone; every merge has the base's head, an EXPERT's or none, as of merge --head.",
)


@click.command("evaluate", epilog=EPILOG)
@click.argument("model", shell_complete=places)
@task_options
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("-o", "--output", type=PLACE, metavar="OUT.json", help="[default: DIRECTORY--OF--MODEL.scores.json]")
@click.option("--force", is_flag=True, help="Replace the scores in OUT.json.")
@debug_option
def evaluate(
    model: str,
    tasks: Path,
    only: tuple[str, ...],
    batch_size: int | None,
    allow_code_execution: bool,
    output: Path | None,
    force: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Score MODEL on the tasks of a file, with a 95 % bootstrap interval for each score."""
    from neuron_methods.evaluation.score_files import check_place, outcomes_file, table, write_evaluation
    from neuron_methods.evaluation.scoring import evaluate as score
    from neuron_methods.evaluation.task_file import choose_tasks, load_tasks
    from neuron_methods.models.processes import process_state
    from neuron_methods.models.reference import ModelName
    from neuron_methods.support.runs import claimed

    chosen = choose_tasks(load_tasks(tasks), only, batch_size, allow_code_execution)
    name = ModelName.parse(model)
    shown = output or Path(f"{name.file_name}.scores.json")
    if not process_state().is_main_process:
        score(model, chosen, progress=not quiet, **settings)
        return
    inputs = [tasks, *name.here(), *(file for task in chosen for file in task.files())]
    place = check_place(shown, force, inputs)
    with claimed(place, f"-o {shown}", pair=outcomes_file(place)):
        evaluation = score(model, chosen, progress=not quiet, **settings)
        write_evaluation(evaluation, place)
    say("\n".join([*table(evaluation), f"written: {shown}"]))
