"""What the zoo's scripts share: a directory of finished stages, its YAML files, and the checks of a zoo.

A zoo is a directory with ``base``, ``experts/TASK``, often ``adapters/TASK`` (LoRA), ``data/TASK/{train,validation,
test}.parquet``, ``tasks.yml`` (for `mergekit-neuron evaluate` and `tune`), ``merge.yml`` and ``checks.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from neuron_methods.kernels.task_vectors import LowRankTaskVector
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_json, write_text
from neuron_methods.support.stages import Stages, own_directory
from neuron_methods.support.text import columns

Weights = dict[str, Tensor]

#: The file that marks a directory as a zoo.
MARK = "zoo.json"
#: Scales tried for task arithmetic, as shares of the sum of the task vectors.
SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


class Zoo:
    """A zoo being built. Stages that are finished, and were built from the same settings, are kept."""

    def __init__(self, out: Path, family: str, seed: int, say: Callable[[str], None] = print) -> None:
        """Create or check the directory.

        Raises:
            UserError: it holds something else, or has a name that mergekit cannot take.
        """
        self.family, self.seed, self.say = family, seed, say
        self.out = own_directory(out, MARK, {"family": family, "seed": seed}, str(out), "a zoo's script")
        self.stages = Stages(self.out / ".stages", "a zoo's script")

    def stage(self, place: str, key: Mapping[str, Any], build: Callable[[Path], Any]) -> Any:
        """Make sure that the directory `place` holds what `build` makes under `key`; see `Stages.run`."""

        def announce_and_build(path: Path) -> Any:
            self.say(f"{self.family}: {place} ...")
            return build(path)

        key = {"family": self.family, "seed": self.seed, **key}
        stage = self.stages.run(self.out / place, key, announce_and_build)
        self.say(f"{self.family}: {place} " + (f"took {stage.seconds:.0f} s" if stage.built else "kept"))
        return stage.result

    def write_yaml(self, tasks: Sequence[Mapping[str, Any]], dtype: str) -> None:
        """Write ``tasks.yml`` and ``merge.yml``; `tasks` are entries without their source."""
        entries = [
            {
                "name": task["name"],
                "kind": task["kind"],
                "data": {"source": f"data/{task['name']}", "split": "test", "validation_split": "validation"},
                **{key: value for key, value in task.items() if key not in ("name", "kind")},
            }
            for task in tasks
        ]
        write_text(self.out / "tasks.yml", _dump({"tasks": entries}))
        recipe = {
            "merge_method": "neuro_merging",
            "base_model": str(self.out / "base"),
            "models": [{"model": str(self.out / "experts" / str(task["name"]))} for task in tasks],
            "parameters": {"density": 0.15, "lambda_orthogonal": "auto"},
            "dtype": dtype,
        }
        write_text(self.out / "merge.yml", _dump(recipe))


def _dump(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def parse_arguments(
    description: str | None, options: Mapping[str, str] | None = None, **flags: str
) -> argparse.Namespace:
    """``OUT [--seed N] [--no-checks]``, `options` that take a value, and `flags`; both with their help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="the zoo's directory")
    parser.add_argument("--seed", type=int, default=0, help="of data, initial weights and training (default: 0)")
    parser.add_argument("--no-checks", action="store_true", help="leave out the scores of base, experts and a merge")
    for name, text in (options or {}).items():
        parser.add_argument(f"--{name}", help=text)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a user's mistake is one line and exit code 1."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def generator(*parts: object) -> torch.Generator:
    """Make a generator whose seed is made of `parts`, the same on every machine."""
    import hashlib

    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def schedule(optimizer: Optimizer, steps: int, warm_up: int) -> LambdaLR:
    """Lead the learning rate up in a line over `warm_up` steps, down along a cosine to a fiftieth over the rest."""

    def factor(step: int) -> float:
        done = min(1.0, max(0.0, (step - warm_up) / max(1, steps - warm_up)))
        return min(1.0, (step + 1) / max(1, warm_up)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    return LambdaLR(optimizer, factor)


def take_step(loss: Tensor, parameters: Iterable[torch.nn.Parameter], optimizer: Optimizer) -> None:
    """Take one step down the gradient, clipped to norm 1."""
    parameters = list(parameters)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class ZooModels:
    """A finished zoo in memory: weights to compute with, one model to put them into, and its tasks.

    Attributes:
        base: θ₀, by the names of the model's parameters.
        experts: θ_t by task; of adapters θ₀ + B·A, never rounded.
        factors: of adapters, B·A by task and parameter, for who takes updates so; empty for full experts.
        tokens: the parameters that are tables of token embeddings; a head tied to one is the same parameter.
    """

    def __init__(
        self, directory: Path, splits: Sequence[str] = ("validation", "test"), *, adapters: bool = False
    ) -> None:
        """Load base, experts and data of a zoo's directory.

        Raises:
            UserError: `adapters` are asked for, and a task has none.
        """
        from neuron_methods.evaluation import load_tasks, open_model, start_task

        self.directory = directory
        tasks = load_tasks(directory / "tasks.yml")
        self.names = [task.name for task in tasks]
        with open_model(str(directory / "base")) as opened:
            self.model, self.processor = opened.model, opened.processor
        self.running = {
            split: {task.name: start_task(self.model, self.processor, task, split) for task in tasks}
            for split in splits
        }
        self.base = weights_of(self.model)
        table = self.model.get_input_embeddings()
        words = table.weight if isinstance(table, torch.nn.Embedding) else None
        self.tokens = tuple(name for name, parameter in self.model.named_parameters() if parameter is words)
        self.experts: dict[str, Weights] = {}
        self.factors: dict[str, dict[str, LowRankTaskVector]] = {}
        for name in self.names:
            if adapters:
                self.factors[name] = factors_of(directory, name)
                formed = {key: self.base[key] + factor.dense() for key, factor in self.factors[name].items()}
                self.experts[name] = {**self.base, **formed}
                continue
            with open_model(str(directory / "experts" / name)) as opened:
                self.experts[name] = weights_of(opened.model)

    def put(self, weights: Weights) -> None:
        """Give the model these weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def outcomes(self, weights: Weights, split: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Score every example per task, in the order of the data."""
        self.put(weights)
        found = {}
        for name in names or self.names:
            found[name] = np.array([o.score for o in self.running[split][name].run().outcomes])
        return found

    def combine(self, scale: float) -> Weights:
        """Merge by task arithmetic: θ₀ + scale Σ_t (θ_t − θ₀)."""
        return {
            name: base + scale * sum(expert[name] - base for expert in self.experts.values())
            for name, base in self.base.items()
        }


def weights_of(model: torch.nn.Module) -> Weights:
    """Copy a model's parameters in float32; tied ones once."""
    return {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}


def has_adapters(directory: Path) -> bool:
    """Tell whether each of a zoo's tasks has a LoRA adapter."""
    tasks = [path.name for path in (directory / "experts").iterdir()]
    return all((directory / "adapters" / name / "adapter_config.json").is_file() for name in tasks)


def factors_of(directory: Path, name: str) -> dict[str, LowRankTaskVector]:
    """Read what a task's adapter adds to the base's parameters, as peft applies it.

    Raises:
        UserError: the task has none.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from neuron_methods.evaluation import open_model

    place = directory / "adapters" / name
    if not (place / "adapter_config.json").is_file():
        raise UserError(f"{place} holds no adapter; make the zoo with --lora")
    found = {}
    with open_model(str(directory / "base"), "float32") as opened, torch.no_grad():
        wrapped = PeftModel.from_pretrained(opened.model, place)
        for path, module in wrapped.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                shape = tuple(module.get_base_layer().weight.shape)
                scaled = b.float() * module.scaling["default"]
                found[f"{path}.weight"] = LowRankTaskVector.of(scaled.clone(), a.float().clone(), shape)
    return found


def mean_score(outcomes: Mapping[str, np.ndarray]) -> float:
    """Compute the mean over tasks of the mean over examples."""
    return float(np.mean([values.mean() for values in outcomes.values()]))


@dataclass(frozen=True)
class Checks:
    """Whether a zoo can tell methods apart; shares of 1, not of 100.

    Attributes:
        base: mean score of the base.
        experts: mean of the experts' scores, each on its own task.
        arithmetic: mean score of task arithmetic at the best scale on validation data.
        scale: that scale.
        paired_error: standard error of the difference between that merge and one at the next scale.
        by_task: per task the three scores.
    """

    base: float
    experts: float
    arithmetic: float
    scale: float
    paired_error: float
    by_task: dict[str, dict[str, float]]

    @property
    def headroom(self) -> float:
        """From the base to the experts."""
        return self.experts - self.base

    @property
    def recovered(self) -> float:
        """Share of the headroom that task arithmetic recovers."""
        return (self.arithmetic - self.base) / self.headroom if self.headroom else 0.0

    def met(self) -> dict[str, bool]:
        """Say what a zoo must fulfil, and whether it does."""
        return {
            "headroom of 25 points": self.headroom >= 0.25,
            "task arithmetic recovers a third": self.recovered >= 1 / 3,
            "1 point is more than two standard errors": 2 * self.paired_error < 0.01,
        }

    def __str__(self) -> str:
        """Lay out scores in percent, and say which checks are met."""
        rows = [("", "base", "expert", "merged")]
        for name, row in self.by_task.items():
            rows.append((name, *(f"{100 * row[key]:.1f}" for key in ("base", "expert", "arithmetic"))))
        rows.append(("mean", *(f"{100 * value:.1f}" for value in (self.base, self.experts, self.arithmetic))))
        lines = columns(rows)
        lines.append(
            f"headroom {100 * self.headroom:.1f} points; task arithmetic (scale {self.scale:g}) recovers "
            f"{100 * self.recovered:.0f} %; standard error of a paired difference {100 * self.paired_error:.2f} points"
        )
        lines += [f"{'ok    ' if fulfilled else 'FAILED'} {what}" for what, fulfilled in self.met().items()]
        return "\n".join(lines)


def check_zoo(models: ZooModels, scales: Sequence[float] = SCALES) -> Checks:
    """Score base, experts and task arithmetic, its scale tuned on validation data."""
    from neuron_methods.evaluation.comparing import paired_difference

    found = [mean_score(models.outcomes(models.combine(scale), "validation")) for scale in scales]
    best = int(np.argmax(found))
    near = best + 1 if best + 1 < len(scales) else best - 1
    base = models.outcomes(models.base, "test")
    merged = models.outcomes(models.combine(scales[best]), "test")
    beside = models.outcomes(models.combine(scales[near]), "test")
    own = {}
    for name in models.names:
        own |= models.outcomes(models.experts[name], "test", [name])
    by_task = {
        name: {"base": base[name].mean(), "expert": own[name].mean(), "arithmetic": merged[name].mean()}
        for name in models.names
    }
    return Checks(
        base=mean_score(base),
        experts=mean_score(own),
        arithmetic=mean_score(merged),
        scale=scales[best],
        # Two merges that are alike differ on few examples; base and merge on as many as any two methods do.
        paired_error=max(paired_difference([merged], [other])[1] for other in (beside, base)),
        by_task={name: {key: float(value) for key, value in row.items()} for name, row in by_task.items()},
    )


def finish(zoo: Zoo, key: Mapping[str, Any], wanted: bool = True, scales: Sequence[float] = SCALES) -> Checks | None:
    """Check a zoo that is complete, unless it was checked before; print and store what was found."""
    if not wanted:
        return None
    path = zoo.out / "checks.json"
    stamp = json.loads(json.dumps({"seed": zoo.seed, **key}))
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stored.get("settings") == stamp:
        checks = Checks(**stored["scores"])
    else:
        zoo.say(f"{zoo.family}: checks ...")
        checks = check_zoo(ZooModels(zoo.out), scales)
        content = {
            "settings": stamp,
            "scores": vars(checks),
            "headroom": checks.headroom,
            "recovered": checks.recovered,
        }
        write_json(path, content | {"met": checks.met()}, indent=1)
    zoo.say(str(checks))
    return checks
