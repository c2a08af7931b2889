"""Measure the routed model of the demo's three adapters, and print tables.

    mergekit-neuron demo --adapters
    mergekit-neuron route routed.yaml ./routed
    python examples/routing/measure_text.py routed.yaml ./routed mergekit-neuron-demo

Experts must be called as the demo's tasks: arithmetic, german, python. Out of domain are prose (paragraphs of Python's
language reference, out of `pydoc_data`: perplexity and next tokens) and beginnings of sentences about
capitals (whether the right one follows).
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure_images import print_times
from transformers import AutoModelForCausalLM
from twin import TwinMerging
from variants import Material, forward_times, show, unpadded_gap

from neuron_methods.data.sources import Sample
from neuron_methods.demo.pipeline import held_out_tasks
from neuron_methods.evaluation import Examples, Task, evaluate_model, read_examples
from neuron_methods.evaluation.tasks import Rows
from neuron_methods.models.loading import load_processor
from neuron_methods.models.reference import Place
from neuron_methods.routing.static import merge_routed

CAPITALS = {
    **{"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"},
    **{"Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana", "India": "New Delhi", "Germany": "Berlin"},
    **{"Russia": "Moscow", "China": "Beijing", "Kenya": "Nairobi", "Poland": "Warsaw", "Austria": "Vienna"},
    **{"Portugal": "Lisbon", "Sweden": "Stockholm", "Finland": "Helsinki", "Ireland": "Dublin"},
}
# The defaults of ours, and ties and task arithmetic over a small grid of their scale.
STATIC: list[tuple[str, dict[str, Any]]] = [
    ("neuro_merging", {}),
    ("min_merging", {}),
    *(("ties", {"density": 0.2, "weight": 1.0, "lambda": scale}) for scale in (1.0, 2.0)),
]


PARTS = [
    *("experts", "enhanced", "routed", "unenhanced", "strangers", "random-expert", "random-layers", "twin"),
    *("sums", "static"),
]


def prose(count: int) -> list[str]:
    """Draw paragraphs of 100 to 400 characters."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    kept = sorted({part for part in paragraphs if 100 < len(part) < 400 and part[0].isupper()})
    return random.Random(0).sample(kept, count)


def padded(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


@torch.no_grad()
def read_prose(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """Measure the perplexity, and the share of next tokens that are the likeliest."""
    loss = right = count = 0.0
    for start in range(0, len(texts), 10):
        inputs = padded(tokenizer, texts[start : start + 10])
        logits = model(**inputs).logits[:, :-1]
        real = inputs["attention_mask"][:, 1:].bool()
        targets = inputs["input_ids"][:, 1:][real]
        loss += float(torch.nn.functional.cross_entropy(logits[real], targets, reduction="sum"))
        right += float((logits[real].argmax(1) == targets).sum())
        count += len(targets)
    return {"perplexity": math.exp(loss / count), "next token": right / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("routed", type=Path)
    parser.add_argument("demo", type=Path, help="directory of the demo: data/TASK.held_out.jsonl")
    parser.add_argument("--examples", type=int, default=100, help="held-out examples of each task")
    parser.add_argument("--ablation-examples", type=int, default=100)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure, in this order")
    arguments = parser.parse_args()
    material = Material(arguments.config, arguments.routed)
    tokenizer = load_processor("AutoTokenizer", Place.parse(material.config.base_model), "base_model")
    names = material.routed.experts
    tasks = {task.name: first_examples(task, arguments.examples) for task in held_out_tasks(arguments.demo)}

    def answers(model: Any, name: str, count: int) -> float:
        task = tasks[name].task
        return evaluate_model(model, tokenizer, task, examples=first_examples(task, count)).score

    def score(model: Any, count: int = arguments.examples) -> dict[str, float]:
        return {name: answers(model, name, count) for name in names}

    right = inside = total = 0
    for name in tasks:
        routing = material.routed.route(**padded(tokenizer, prompts(tasks[name])))
        right += int((routing.probabilities.argmax(1) == names.index(name)).sum())
        inside += int(routing.in_domain.sum())
        total += len(routing)
    print(
        f"router on {total} held-out prompts: {right / total:.1%} to their own expert, {inside / total:.1%} in domain"
    )
    mixed = padded(tokenizer, [prompt for examples in tasks.values() for prompt in prompts(examples)[:8]])
    print(f"mixed batch of {len(mixed['input_ids'])}: at most {unpadded_gap(material.routed, mixed):.1e} from alone")
    print_times(forward_times(material, mixed))

    rows: dict[str, dict[str, float]] = {}

    def add(label: str, scores: dict[str, float]) -> None:
        rows[label] = scores
        print(f"{label}: {scores}", flush=True)

    few = arguments.ablation_examples
    for part in arguments.parts:
        if part in ("experts", "enhanced"):
            model = material.plain if part == "experts" else material.routed
            own = {}
            for name in names:
                with material.fixed(model, {name: 1.0}) as expert:
                    own[name] = answers(expert, name, arguments.examples)
            add("experts, each on its own task" if part == "experts" else "enhanced experts", own)
        elif part == "routed":
            add("routed", score(material.routed))
        elif part == "unenhanced":
            add("routed, without enhancement", score(material.plain))
        elif part == "strangers":
            measure_strangers(material, tokenizer)
        elif part == "random-expert":
            with material.redundant(material.routed, "random") as model:
                add("routed, redundant layers to a random expert", score(model, few))
        elif part == "random-layers":
            with material.random_core(seed=0) as model:
                add("routed, as many layers redundant at random", score(model, few))
        elif part == "twin":
            add("Twin-Merging, scale 0.3, rank 8", score(TwinMerging(material).eval(), few))
        elif part == "sums":
            for weight in (0.4, 0.7):
                with material.fixed(material.plain, dict.fromkeys(names, weight)) as merged:
                    add(f"static, task_arithmetic, weight {weight}", score(merged, few))
        else:
            with tempfile.TemporaryDirectory() as folder:
                for method, parameters in STATIC:
                    path = material.merged(Path(folder), method, **parameters)
                    merged = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                    add(f"static, {method} {parameters or '(defaults)'}", score(merged, few))
                merge_routed(arguments.config, Path(folder) / "response")
                merged = AutoModelForCausalLM.from_pretrained(Path(folder) / "response", dtype=torch.float32).eval()
                add("static, neuron_response with inputs", score(merged, few))
    if rows:
        print(f"\n{show(rows)}")


def measure_strangers(material: Material, tokenizer: Any) -> None:
    """Score base and routed model out of domain, and count how much is left to the base."""
    texts = prose(40)
    questions = capitals()

    def report(label: str, model: Any) -> None:
        outcomes = evaluate_model(model, tokenizer, questions.task, examples=questions).outcomes
        right = statistics.mean(outcome.target in outcome.prediction for outcome in outcomes)
        print(f"out of domain, {label}: {read_prose(model, tokenizer, texts)}, capitals {right:.1%}", flush=True)

    with material.fixed(material.routed, {}) as base:
        report("base", base)
    report("routed", material.routed)
    for label, some in (("prose", texts), ("capitals", prompts(questions))):
        left = (~material.routed.route(**padded(tokenizer, some)).in_domain).float().mean()
        print(f"out of domain, {label}: {float(left):.1%} left to the base", flush=True)


def first_examples(task: Task, count: int) -> Examples:
    """Read the first `count` examples of a task, all where there are fewer."""
    return read_examples(replace(task, test=replace(task.test, stop=count)))


def prompts(examples: Examples) -> list[str]:
    return [examples.text(index, "input") for index in range(len(examples))]


def capitals() -> Examples:
    """Make beginnings of sentences, and the capital that follows."""
    columns, settings = {"input": "prompt", "target": "answer"}, {"max_new_tokens": 8, "stop": "\n"}
    rows = Rows("capitals", local=False)
    task = Task("capitals", "generation", "capitals", rows, None, columns, "exact_match", 40, settings=settings)
    asked = [(f"The capital of {country} is", capital) for country, capital in CAPITALS.items()]
    return Examples(task, "test", None, [Sample(i, i, row) for i, row in enumerate(asked)], list(columns))


if __name__ == "__main__":
    main()
