"""Tasks of EleutherAI's lm-evaluation-harness, by their names there."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar, NamedTuple

from neuron_methods.evaluation.kinds.prompting import CHAT, chat_template, chats, check_chat
from neuron_methods.evaluation.kinds.scorer import Scorer
from neuron_methods.evaluation.kinds.setting_checks import string, whole_number
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import listed

# Its metrics that are 0 to 100, as sacrebleu has them; ours of these names are 0 to 1.
_OF_100 = ("bleu", "chrf", "chrf++")


class Harness(Scorer):
    """`task` names the harness's task, `metric` one of its metrics (or METRIC,FILTER).

    `include_path` is a folder with tasks of one's own.
    """

    metrics = ()
    settings: ClassVar = {
        "task": string("the name of a task of lm-evaluation-harness"),
        "num_fewshot": whole_number(0),
        "include_path": string("a folder"),
        **CHAT,
    }
    required = ("task",)
    path_settings = ("include_path", "template")
    reads_data = False

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> tuple[str, str] | None:
        """Find what has no effect."""
        return check_chat(settings)

    @classmethod
    def check_model(cls, task: Task, config: Any, architecture: str, shown: str) -> None:
        """Refuse any model where the package is missing, too."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"task {task.name!r}: kind lm-eval needs the package lm_eval: pip install 'mergekit-neuron[lm-eval]'"
            )
        super().check_model(task, config, architecture, shown)


class Found(NamedTuple):
    """What the harness found, of one metric.

    Attributes:
        metric: its name, with the filter of the answers where the harness names one: ``exact_match,strict-match``.
        score: of the task or group.
        error: the standard error of the score; 0 where the harness gives none.
        scores: (row, score) of every example that has one of its own; rows of a group are counted through its tasks.
        count: how many examples were scored.
    """

    metric: str
    score: float
    error: float
    scores: list[tuple[int, float]]
    count: int


def run_harness(model: Any, tokenizer: Any, task: Task, seed: int) -> Found:
    """Let the harness score a model.

    Raises:
        UserError: the harness has no such task or metric, or cannot get its data.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name, chat = task.settings["task"], chats(task.settings)
    if chat:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template(tokenizer, task)
    try:
        manager = TaskManager(include_path=task.settings.get("include_path"))
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=task.batch_size),
            tasks=[name],
            num_fewshot=task.settings.get("num_fewshot"),
            limit=task.limit or None,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=task.settings.get("system"),
            task_manager=manager,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # whatever the harness, datasets and their network raise
        what = str(error) or "it says no more; run again with --debug for the traceback"
        raise UserError(f"task {task.name!r}: lm-evaluation-harness: {type(error).__name__}: {what}") from error
    results = found["results"]
    if name not in results and len(results) != 1:
        raise UserError(
            f"task {task.name!r}: task: {name} stands for tasks that have no score in common: "
            f"{listed(list(results))}; name one"
        )
    return _read(task, results.get(name) or next(iter(results.values())), found["samples"])


def _read(task: Task, results: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]]) -> Found:
    """Read one metric out of what the harness returns; the first, unless the task names one.

    Args:
        task: with the name of a metric (its first filter is meant), of metric and filter, or none.
        results: by ``METRIC,FILTER`` and ``METRIC_stderr,FILTER``, among other things.
        samples: of each task, one record for every example and filter.
    """
    scores = {
        key: float(value)
        for key, value in results.items()
        if "," in key and isinstance(value, (int, float)) and "_stderr," not in key
    }
    chosen = next((key for key in scores if task.metric in (None, key, key.partition(",")[0])), None)
    if chosen is None:
        known = listed([key.removesuffix(",none") for key in scores]) or "none"
        raise UserError(f"task {task.name!r}: metric: {task.settings['task']} has no {task.metric!r} (it has: {known})")
    metric, _, kept = chosen.partition(",")
    error = results.get(f"{metric}_stderr,{kept}")
    most = 100.0 if metric in _OF_100 else 1.0
    records = [[record for record in records if record.get("filter", kept) == kept] for records in samples.values()]
    rows = list(chain.from_iterable(records))
    return Found(
        metric=chosen.removesuffix(",none"),
        score=scores[chosen] / most,
        error=error / most if isinstance(error, float) else 0.0,
        scores=[
            (place if len(records) > 1 else record.get("doc_id", place), float(value))
            for place, record in enumerate(rows)
            if isinstance(value := record.get(metric), (int, float))
        ],
        count=len(rows),
    )
