"""Generated Llamas of any size, written as fast as the disk writes: for merges whose time is measured, or planned."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file

RANK = 16
SHARD_BYTES = 10**9
# A normal number for each weight would take longer than most merges: these repeat, from another one on in each tensor.
_POOL = 2**22 + 1


@dataclass(frozen=True)
class Shape:
    """A Llama: numbers of its config."""

    hidden: int
    inner: int
    layers: int
    heads: int
    shared_heads: int
    tokens: int

    def config(self) -> dict[str, Any]:
        """Give config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "vocab_size": self.tokens,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.shared_heads,
            "tie_word_embeddings": False,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """List all tensors with their shapes."""
        shared = self.hidden * self.shared_heads // self.heads
        yield "model.embed_tokens.weight", (self.tokens, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.self_attn.k_proj.weight", (shared, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (shared, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.tokens, self.hidden)

    @property
    def parameters(self) -> int:
        """Count the entries of all tensors."""
        return sum(torch.Size(shape).numel() for _, shape in self.tensors())


SHAPES = {
    "tiny": Shape(64, 176, 2, 4, 2, 512),
    "0.1b": Shape(768, 2048, 12, 12, 4, 16000),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "3b": Shape(3072, 8192, 26, 24, 8, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "405b": Shape(16384, 53248, 126, 128, 8, 128256),
}


def write_model(place: Path, shape: Shape, seed: int | None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint of random weights in shards, several at a time, unless it is there.

    Args:
        place: its directory.
        shape: of the model.
        seed: 0: a base; otherwise an expert of it, which is the base and noise. None: the files have headers alone, and
            take no room.
        shard_bytes: of a file at most, unless it holds one tensor.
    """
    if (place / "config.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    starts: dict[str, int] = {}
    size = 0
    for number, (name, axes) in enumerate(shape.tensors()):
        entries = torch.Size(axes).numel()
        size += 2 * entries
        if shards[-1] and size > shard_bytes:
            shards.append({})
            size = 2 * entries
        shards[-1][name] = axes
        starts[name] = 7919 * number % _POOL
    files = {place / f"model-{number:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
    weights = None if seed is None else _weights(seed)
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as threads:
        for _ in threads.map(lambda file: _write_shard(file, files[file], starts, weights), files):
            pass
    weight_map = {name: file.name for file, shard in files.items() for name in shard}
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (place / "config.json").write_text(json.dumps(shape.config()))


def _weights(seed: int) -> memoryview:
    """Draw the weights that repeat in one model, in bfloat16."""
    values = [
        torch.empty(_POOL, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(one))
        for one in sorted({0, seed})
    ]
    weights = values[0] if len(values) == 1 else values[1].mul_(0.02).add_(values[0])
    return memoryview(weights.view(torch.uint8).numpy()).cast("B")


def _write_shard(
    place: Path, shard: dict[str, tuple[int, ...]], starts: dict[str, int], weights: memoryview | None
) -> None:
    end, header = 0, {}
    for name, axes in shard.items():
        begin, end = end, end + 2 * torch.Size(axes).numel()
        header[name] = {"dtype": "BF16", "shape": axes, "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content = content.ljust(len(content) + -len(content) % 8)  # so that what lies behind it is aligned
    with place.open("wb", buffering=0) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        if weights is None:
            file.truncate(8 + len(content) + end)
            return
        for name, axes in shard.items():
            _repeat(file, weights, 2 * starts[name], 2 * torch.Size(axes).numel())


def _repeat(file: BinaryIO, data: memoryview, start: int, count: int) -> None:
    """Write so many bytes of data that begins anew when it ends."""
    while count:
        written = file.write(data[start : start + count])
        start, count = (start + written) % len(data), count - written


def write_adapter(place: Path, shape: Shape, seed: int, base: Path) -> None:
    """Write a LoRA adapter of rank 16 on all linear modules of the layers."""
    if (place / "adapter_config.json").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, size in shape.tensors():
        if "_proj." in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{path}.lora_A.weight"] = torch.empty(RANK, size[1]).normal_(0, 0.02, generator=generator)
            factors[f"{path}.lora_B.weight"] = torch.empty(size[0], RANK).normal_(0, 0.002, generator=generator)
    save_file(factors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": modules, "base_model_name_or_path": str(base)}
    (place / "adapter_config.json").write_text(json.dumps(config))


def link(place: Path, original: Path) -> None:
    """Make a directory whose files are hard links to another's."""
    if not place.exists():
        place.mkdir()
        for file in original.iterdir():
            os.link(file, place / file.name)


def write_models(directory: Path, shape: Shape, kind: str, experts: int, distinct: int) -> tuple[Path, list[str]]:
    """Write base and experts; give the base, and the experts as a YAML names them."""
    base = directory / "base"
    write_model(base, shape, 0)
    places = [directory / f"{kind}-{index}" for index in range(experts)]
    for index, place in enumerate(places):
        if index >= distinct:
            link(place, places[index % distinct])
        elif kind == "full":
            write_model(place, shape, index + 1)
        else:
            write_adapter(place, shape, index + 1, base)
    return base, [str(place) if kind == "full" else f"{base}+{place}" for place in places]


def write_hollow(directory: Path, shape: Shape, experts: int) -> tuple[Path, list[str]]:
    """Write a base and experts that are headers alone, in files that take no room: enough to plan a merge of them."""
    base = directory / "base"
    write_model(base, shape, None, 5 * SHARD_BYTES)
    places = [directory / f"expert-{index}" for index in range(experts)]
    for place in places:
        link(place, base)
    return base, list(map(str, places))
