"""Tasks of EleutherAI's lm-evaluation-harness, by their names there."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

from neuron_methods.evaluation.kinds.prompting import CHAT, chat_template, chats, check_chat
from neuron_methods.evaluation.kinds.scorer import Scorer
from neuron_methods.evaluation.kinds.setting_checks import string, whole_number
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError


class Harness(Scorer):
    """`task` names the harness's task, `metric` one of its metrics, `include_path` a folder with tasks of one's own."""

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


def run_harness(model: Any, tokenizer: Any, task: Task, seed: int) -> tuple[float, float, list[dict[str, Any]]]:
    """Let the harness score a model.

    Returns:
        (score, its standard error, the harness's records of the examples).

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
        raise UserError(f"task {task.name!r}: lm-evaluation-harness: {type(error).__name__}: {error}") from error
    results = found["results"].get(name) or next(iter(found["results"].values()))
    scores = {k.split(",")[0]: v for k, v in results.items() if isinstance(v, float) and "_stderr" not in k}
    errors = {k.split(",")[0].removesuffix("_stderr"): v for k, v in results.items() if "_stderr" in k}
    metric = task.metric or next(iter(scores), None)
    if metric not in scores:
        raise UserError(f"task {task.name!r}: metric: {name} has no {metric!r} (it has: {', '.join(scores)})")
    error = errors.get(metric)
    return scores[metric], error if isinstance(error, float) else 0.0, next(iter(found["samples"].values()), [])
