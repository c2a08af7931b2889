"""Make the T5 zoo: a small gated T5 (the form of v1.1 and Flan) and six experts, from what Python itself carries.

    python examples/zoo/t5.py OUT [--seed N] [--lora]

The base reads and writes words. It learns to fill gaps in phrases and in the text of Python's language reference, and
relatives of the tasks (`text_tasks`); every expert is fine-tuned to one task. With ``--lora`` every task has a LoRA
adapter too.

Finished stages are kept: run it again to resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Zoo, finish, parse_arguments, run_script, schedule, take_step
from text_tasks import PREFIXES, PRETRAINING, SENTINELS, TASKS, Pair, draw, vocabulary
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from neuron_methods.support.progress import progress_bar
from neuron_methods.support.quiet import quiet_transformers

#: The modules that LoRA adapts: every matrix of the layers.
LORA_TARGETS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")


@dataclass(frozen=True)
class Settings:
    """Sizes and training of the zoo.

    Attributes:
        tasks: names out of `text_tasks.TASKS`.
        width: features per token; the MLPs are twice as wide.
        layers: of the encoder, and of the decoder.
        pretraining_steps: of the base.
        pretraining_batch: pairs per step.
        steps: of an expert.
        batch: pairs per step of an expert.
        learning_rate: of a full expert.
        lora_rank: of an adapter; its alpha is twice that.
        lora_learning_rate: of an adapter.
        train: pairs to train an expert on.
        validation: pairs to tune merges on, per task.
        test: pairs to score on, per task.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    width: int = 128
    layers: int = 2
    pretraining_steps: int = 4000
    pretraining_batch: int = 64
    steps: int = 240
    batch: int = 64
    learning_rate: float = 1e-3
    lora_rank: int = 8
    lora_learning_rate: float = 4e-3
    train: int = 6000
    validation: int = 300
    test: int = 2500


def build_zoo(
    out: Path,
    settings: Settings,
    seed: int = 0,
    *,
    lora: bool = False,
    checks: bool = True,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> None:
    """Do every stage that is not done yet.

    Raises:
        UserError: `out` cannot be used.
    """
    zoo = Zoo(out, "t5", seed, say)
    sizes = {split: getattr(settings, split) for split in ("train", "validation", "test")}
    pairs = {name: draw(TASKS[name], sizes, seed) for name in settings.tasks}
    about_data = {"stage": "data", "tasks": settings.tasks, "sizes": sizes}
    zoo.stage("data", about_data, lambda path: write_data(path, pairs))
    about_base = {
        key: value
        for key, value in asdict(settings).items()
        if key in ("width", "layers") or key.startswith("pretraining")
    } | {"stage": "base"}
    base = zoo.out / "base"
    zoo.stage("base", about_base, lambda path: make_base(path, settings, seed, progress))

    about_training = {"data": about_data, "base": about_base, "steps": settings.steps, "batch": settings.batch}
    kinds: list[tuple[str, dict[str, Any]]] = [("experts", {"learning_rate": settings.learning_rate})]
    if lora:
        kinds.append(("adapters", {"learning_rate": settings.lora_learning_rate, "rank": settings.lora_rank}))
    for place, training in kinds:
        for name in settings.tasks:
            about = {**about_training, **training, "stage": place, "task": name}

            def build(path: Path, name: str = name, training: dict[str, Any] = training) -> dict[str, float]:
                return train_expert(base, path, pairs[name]["train"], settings, seed, name, progress, **training)

            zoo.stage(f"{place}/{name}", about, build)
    entries = [
        {
            "name": name,
            "kind": "text-to-text",
            "columns": {"input": "prompt", "target": "answer"},
            "metric": "exact_match",
            "batch_size": 500,
            "max_new_tokens": 2 + max(len(answer.split()) for split in pairs[name].values() for _, answer in split),
        }
        for name in settings.tasks
    ]
    zoo.write_yaml(entries, "float32")
    finish(zoo, {"training": about_training, "full": kinds[0][1]}, checks)


def write_data(path: Path, pairs: dict[str, dict[str, list[Pair]]]) -> None:
    """Write all tasks and splits as parquet with the columns ``prompt`` and ``answer``."""
    import pyarrow
    import pyarrow.parquet as parquet

    for name, splits in pairs.items():
        (path / name).mkdir(parents=True)
        for split, rows in splits.items():
            columns = {"prompt": [prompt for prompt, _ in rows], "answer": [answer for _, answer in rows]}
            parquet.write_table(pyarrow.table(columns), path / name / f"{split}.parquet")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a token per word, so that a small model need not learn to spell; ``</s>`` ends every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = ("<pad>", "</s>", "<unk>", *SENTINELS, *PREFIXES, *vocabulary())
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SENTINELS),
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def make_base(path: Path, settings: Settings, seed: int, progress: bool) -> dict[str, float]:
    """Pre-train, and save model and tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=settings.width,
            d_kv=settings.width // 4,
            d_ff=2 * settings.width,
            num_layers=settings.layers,
            num_decoder_layers=settings.layers,
            num_heads=4,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    # transformers gives an untied head a deviation of 1, and so a loss of 48 to start from; and with faint relative
    # positions it takes thousands of steps until words are told apart by where they stand.
    torch.nn.init.normal_(model.lm_head.weight, std=settings.width**-0.5)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    rng = random.Random(f"t5/{seed}/pretraining")

    def batches() -> Iterator[list[Pair]]:
        while True:
            drawn = [rng.choice(PRETRAINING)(rng) for _ in range(8 * settings.pretraining_batch)]
            yield from by_length(drawn, settings.pretraining_batch, rng)

    loss = train(model, tokenizer, batches(), settings.pretraining_steps, 3e-3, "base", progress)
    save(model, tokenizer, path)
    return {"loss": loss}


def by_length(pairs: list[Pair], size: int, rng: random.Random) -> list[list[Pair]]:
    """Cut pairs into batches of like length, in random order."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    cut = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    rng.shuffle(cut)
    return cut


def train(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterator[Sequence[Pair]],
    steps: int,
    learning_rate: float,
    name: str,
    progress: bool,
) -> float:
    """Train on so many batches; returns the loss, averaged over the last fifty or so."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    rate = schedule(optimizer, steps, max(1, min(100, steps // 10)))
    model.train()
    running = None
    with progress_bar(range(steps), what=name, unit="step", shown=progress, leave=False) as bar:
        for _ in bar:
            loss = model(**encode(tokenizer, next(batches))).loss
            take_step(loss, trained, optimizer)
            rate.step()
            running = loss.item() if running is None else running + 0.02 * (loss.item() - running)
            bar.set_postfix_str(f"loss {running:.3f}", refresh=False)
    model.eval()
    return round(running or 0.0, 4)


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Make token ids (n, length), their mask, and labels (n, length), -100 where an answer has ended."""
    inputs = tokenizer([prompt for prompt, _ in pairs], padding=True, return_tensors="pt")
    labels = tokenizer([answer for _, answer in pairs], padding=True, return_tensors="pt")
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "labels": labels.input_ids.masked_fill(labels.attention_mask == 0, -100),
    }


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save model and tokenizer."""
    with quiet_transformers():
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def train_expert(
    base: Path,
    path: Path,
    pairs: list[Pair],
    settings: Settings,
    seed: int,
    name: str,
    progress: bool,
    learning_rate: float,
    rank: int = 0,
) -> dict[str, float]:
    """Fine-tune the base on a task; with a `rank`, a LoRA adapter."""
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model = T5ForConditionalGeneration.from_pretrained(base, local_files_only=True)
    if rank:
        from peft import LoraConfig, get_peft_model

        targets = rf".*\.({'|'.join(LORA_TARGETS)})"
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="SEQ_2_SEQ_LM")
        )
    rng = random.Random(f"t5/{seed}/{name}")

    def batches() -> Iterator[list[Pair]]:
        while True:
            yield from by_length(rng.sample(pairs, min(len(pairs), 8 * settings.batch)), settings.batch, rng)

    loss = train(model, tokenizer, batches(), settings.steps, learning_rate, name, progress)
    if rank:
        with quiet_transformers():
            model.save_pretrained(path, save_embedding_layers=False)
    else:
        save(model, tokenizer, path)
    return {"loss": loss}


def main() -> None:
    arguments = parse_arguments(__doc__, lora="train a LoRA adapter per task too")
    build_zoo(arguments.out, Settings(), arguments.seed, lora=arguments.lora, checks=not arguments.no_checks)


if __name__ == "__main__":
    run_script(main)
