"""The demo from end to end: base, three experts, their merge, and how each of them scores on each task."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from neuron_methods import evaluation
from neuron_methods.demo.base_model import BASE_NAME, find_gguf, save_base
from neuron_methods.demo.expert_training import TrainingSettings, train_expert
from neuron_methods.demo.outcome import DemoReport, spread_of
from neuron_methods.demo.questions import DemoTask, build_tasks, digest
from neuron_methods.evaluation.tasks import Task
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_text
from neuron_methods.support.fingerprints import file_state
from neuron_methods.support.runs import claimed
from neuron_methods.support.stages import Stage, Stages, own_directory

#: What the demo merges by.
METHOD = "neuron_response"

#: Of a quick run and a full one: training examples of a task that an expert's inputs are measured on.
MEASURED_EXAMPLES = {"quick": 16, "full": 40}

#: Likewise, held-out examples that are asked of each task.
ASKED_EXAMPLES = {"quick": 40, "full": 100}

#: What is known of finished stages, within the demo's directory.
RECORDS = ".stages"

#: Where the experts' inputs are, likewise.
INPUTS = "inputs"


@dataclass(frozen=True)
class DemoSettings:
    """What the user can choose.

    Attributes:
        out: directory for everything the demo writes.
        full: train experts until they have learnt their task, and ask each of them every task.
        steps: training steps per expert; None: what its task needs.
        examples: held-out examples per task; None: `ASKED_EXAMPLES`.
        seed: of the tasks' split, the training and its order.
        force: do every stage again.
        progress: show progress bars.
        adapters: merge the experts' LoRA adapters instead of the full models they make.
    """

    out: Path = Path("mergekit-neuron-demo")
    full: bool = False
    steps: int | None = None
    examples: int | None = None
    seed: int = 0
    force: bool = False
    progress: bool = True
    adapters: bool = False

    @property
    def size(self) -> str:
        """The name of how much is done: ``quick`` or ``full``."""
        return "full" if self.full else "quick"


def base_key(gguf: Path) -> dict[str, Any]:
    """Identify the base that is made from a GGUF file."""
    return {"stage": "base", "file": gguf.name, "state": file_state(gguf), "dtype": "bfloat16"}


def expert_key(base: dict[str, Any], task: DemoTask, training: TrainingSettings) -> dict[str, Any]:
    """Identify the expert of a task, by its base, its examples and how it is trained."""
    key = {"stage": "expert", "base": base, "task": task.name, "examples": digest(task.train)}
    return key | {"training": asdict(training)}


def training_settings(task: DemoTask, settings: DemoSettings) -> TrainingSettings:
    """Choose how the expert of a task is trained."""
    if settings.full:
        return TrainingSettings(steps=settings.steps or task.steps, seed=settings.seed)
    quick = task.quick
    return TrainingSettings(settings.steps or quick.steps, quick.batch_size, quick.learning_rate, seed=settings.seed)


def run_demo(settings: DemoSettings, say: Callable[[str], None] = print) -> DemoReport:
    """Do every stage that is not done yet, each told to `say` in one line, and report.

    Raises:
        UserError: the model's package is missing, or `out` cannot be used.
    """
    if settings.steps is not None and settings.steps < 1:
        raise UserError(f"--steps {settings.steps}: an expert needs at least 1 step")
    asked = ASKED_EXAMPLES[settings.size] if settings.examples is None else settings.examples
    tasks = build_tasks(asked, settings.seed)
    gguf = find_gguf()
    chosen = {"steps": settings.steps, "examples": asked, "seed": settings.seed}
    with claimed(settings.out.resolve(), f"--out {settings.out}", inside=True):
        out = own_directory(settings.out, "demo.json", chosen, f"--out {settings.out}", "the demo")
        demo = _Demo(settings, out, tasks, say)
        with demo.stages.alone():
            return _run_stages(demo, gguf)


def _run_stages(demo: _Demo, gguf: Path) -> DemoReport:
    settings, out, tasks = demo.settings, demo.out, demo.tasks
    for task in tasks:
        for part, items in (("train", task.train), ("held_out", task.held_out)):
            lines = [json.dumps(asdict(example), ensure_ascii=False) for example in items]
            write_text(out / "data" / f"{task.name}.{part}.jsonl", "\n".join(lines) + "\n")
    write_text(out / "tasks.yml", task_file(tasks))
    base = demo.save_base(gguf)
    expert_keys = {task.name: demo.train(task, base) for task in tasks}
    experts = [out / "experts" / task.name for task in tasks]
    references = [f"{out / 'base'}+{e / 'adapter'}" if settings.adapters else str(e / "full") for e in experts]
    inputs_key = demo.measure_inputs(expert_keys)
    profiles = [inputs_file(out / INPUTS, task) for task in tasks]
    merge_yaml = merge_recipe(out / "base", references, profiles)
    write_text(out / "merge.yaml", merge_yaml)
    merge_key, summary = demo.merge(merge_yaml, inputs_key)

    merged = demo.score("merge", out / "merged", merge_key)  # first: it is what one waits for
    demo.say(f"merge: {spread_of(merged, merged)} % of answers are right; base and experts are asked now")
    scores = {"base": demo.score("base", out / "base", base)}
    for name, key in expert_keys.items():
        only = None if settings.full else name
        scores[f"expert-{name}"] = demo.score(f"expert-{name}", out / "experts" / name / "full", key, only)
    scores["merge"] = merged
    report = DemoReport(settings.full, out, tasks, scores, merge_yaml, summary, demo.seconds)
    write_text(out / "report.txt", f"{report}\n")
    return report


def merge_recipe(base: Path, experts: list[str], profiles: list[Path]) -> str:
    """Write the mergekit YAML that merges `experts`, for this package's command and mergekit's own alike.

    Each expert has the file of its inputs; they count half, and the rows of its update, which stand for them, half.
    """
    recipe = {
        "merge_method": METHOD,
        "base_model": str(base),
        "models": [
            {"model": expert, "parameters": {"profile": str(profile)}}
            for expert, profile in zip(experts, profiles, strict=True)
        ],
        "parameters": {"inputs": "both"},
        "dtype": "bfloat16",
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=1000)


def inputs_file(directory: Path, task: DemoTask) -> Path:
    """Name the file of the inputs of a task's expert."""
    return directory / f"{task.name}.safetensors"


def task_file(tasks: list[DemoTask]) -> str:
    """Write the tasks for `mergekit-neuron evaluate` and `tune`: one half of the held-out examples for each."""
    entries = []
    for task in tasks:
        half = max(len(task.held_out) // 2, 1)
        data = {
            "source": f"data/{task.name}.held_out.jsonl",
            "split": f"[:{half}]",
            "validation_split": f"[{half}:]",
        }
        columns = {"input": "prompt", "target": "answer"}
        settings = {"max_new_tokens": task.max_new_tokens, "stop": "\n", "batch_size": 40}
        entries.append({"name": task.name, "kind": "generation", "data": data, "columns": columns, **settings})
    return yaml.safe_dump({"tasks": entries}, sort_keys=False)


def held_out_tasks(out: Path) -> list[Task]:
    """Read the tasks in a demo's directory, with all of the held-out examples to score on."""
    tasks = evaluation.load_tasks(out / "tasks.yml")
    return [replace(task, test=replace(task.test, start=0, stop=None)) for task in tasks]


class _Demo:
    """The stages of one run. Each returns the settings that identify its outcome, for the stages that build on it."""

    def __init__(self, settings: DemoSettings, out: Path, tasks: list[DemoTask], say: Callable[[str], None]) -> None:
        self.settings, self.out, self.tasks, self.say = settings, out, tasks, say
        self.stages = Stages(out / RECORDS, "the demo")
        self.seconds: dict[str, float] = {}

    def _stage(self, what: str, directory: Path, key: dict[str, Any], build: Callable[[Path], Any]) -> Stage:
        def announce_and_build(path: Path) -> Any:
            self.say(f"{what} ...")
            return build(path)

        stage = self.stages.run(directory, key, announce_and_build, redo=self.settings.force)
        if not stage.built:
            self.say(f"{what}: done before, kept ({directory})")
        self.seconds[what] = stage.seconds
        return stage

    def save_base(self, gguf: Path) -> dict[str, Any]:
        key = base_key(gguf)
        self._stage(f"base: {BASE_NAME} as safetensors", self.out / "base", key, lambda path: save_base(gguf, path))
        return key

    def train(self, task: DemoTask, base: dict[str, Any]) -> dict[str, Any]:
        training = training_settings(task, self.settings)
        key = expert_key(base, task, training)

        def build(path: Path) -> dict[str, Any]:
            options = {"description": f"train {task.name}", "progress": self.settings.progress}
            losses = train_expert(self.out / "base", task.train, training, path, **options)
            return {"losses": [round(loss, 4) for loss in losses]}

        self._stage(f"expert {task.name}: {task.title}", self.out / "experts" / task.name, key, build)
        return key

    def measure_inputs(self, expert_keys: dict[str, Any]) -> dict[str, Any]:
        """Measure what every expert's layers are given on examples of its task.

        The full experts are measured, whichever are merged: it is quicker, and their layers are given the same.
        """
        from neuron_methods.profiling import InputSettings, measure_inputs

        measured = MEASURED_EXAMPLES[self.settings.size]
        settings = InputSettings(samples=measured, separator=" ", dtype="float32")
        key = {"stage": "inputs", "experts": expert_keys, "settings": settings.outcome}

        def build(path: Path) -> None:
            for task in self.tasks:
                data = f"{task.name}={self.out / 'data' / task.name}.train.jsonl:prompt,answer"
                expert, file = self.out / "experts" / task.name / "full", inputs_file(path, task)
                measure_inputs(str(expert), [data], file, settings, progress=self.settings.progress)

        self._stage(f"inputs: of each expert's layers on {measured} examples", self.out / INPUTS, key, build)
        return key

    def merge(self, merge_yaml: str, inputs_key: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Merge; returns the merge's own summary, too."""
        from neuron_methods.plugin.merging import merge_to_directory
        from neuron_methods.sharing.publishing import merge_witness

        key = {"stage": "merge", "yaml": merge_yaml, "inputs": inputs_key}

        def build(path: Path) -> str:
            summary = merge_to_directory(
                merge_yaml, str(path), progress=self.settings.progress, witness=merge_witness(), resume=False
            )
            return str(replace(summary, out_path=str(self.out / "merged")))

        stage = self._stage(f"merge: {METHOD}", self.out / "merged", key, build)
        return key, stage.result

    def score(
        self, name: str, model_path: Path, model_key: dict[str, Any], only: str | None = None
    ) -> dict[str, dict[str, Any]]:
        """Ask a model every task, or `only` one of them."""
        held_out = {task.name: digest(task.held_out) for task in self.tasks if only in (None, task.name)}
        key = {"stage": "answers", "model": model_key, "held_out": held_out}

        def build(path: Path) -> dict[str, Any]:
            tasks = [task for task in held_out_tasks(self.out) if task.name in held_out]
            found = evaluation.evaluate(str(model_path), tasks, dtype="float32", progress=self.settings.progress)
            evaluation.write_evaluation(found, path / "scores.json")
            return {
                result.name: {
                    "scores": [outcome.score for outcome in result.outcomes],
                    "answers": [outcome.prediction for outcome in result.outcomes],
                }
                for result in found.tasks
            }

        return self._stage(f"scores of {name}", self.out / "scores" / name, key, build).result
