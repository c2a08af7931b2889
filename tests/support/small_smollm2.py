"""A corner of SmolLM2 in a package like the demo's own: its first layers, rows, columns and tokens, as GGUF."""

from __future__ import annotations

from pathlib import Path

from neuron_methods.demo.base_model import PACKAGE, find_gguf

LAYERS, HIDDEN, NEURONS, TOKENS = 4, 192, 512, 4096
HEADS, HEAD = 3, 64  # three query heads share one of keys and values, as in SmolLM2
# How much of each axis of a tensor is kept, as GGUF names tensors.
KEPT = {
    "token_embd": (TOKENS, HIDDEN),
    "output_norm": (HIDDEN,),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD, HIDDEN),
    "attn_k": (HEAD, HIDDEN),
    "attn_v": (HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_gate": (NEURONS, HIDDEN),
    "ffn_up": (NEURONS, HIDDEN),
    "ffn_down": (HIDDEN, NEURONS),
}
SMALLER = {
    "llama.block_count": LAYERS,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": NEURONS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": 1,
    "llama.vocab_size": TOKENS,
}


def save_small_package(folder: Path) -> Path:
    """Write the package into `folder`, which is to come before others on the path; returns the GGUF file.

    Every number of the model is SmolLM2's, and its tokenizer is SmolLM2's with the merges it learnt first.
    """
    import gguf
    import numpy as np

    whole = gguf.GGUFReader(find_gguf())
    package = folder / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    path = package / "small-smollm2.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in whole.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        value = SMALLER.get(key, field.contents())
        if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            value = value[:TOKENS]
        elif key == "tokenizer.ggml.merges":
            made = set(whole.fields["tokenizer.ggml.tokens"].contents()[:TOKENS])
            value = [merge for merge in value if merge.replace(" ", "") in made]
        writer.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in whole.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk" and int(parts[1]) >= LAYERS:
            continue
        values = gguf.quants.dequantize(tensor.data[: KEPT[parts[-1]][0]], tensor.tensor_type)
        kept = values[tuple(map(slice, KEPT[parts[-1]]))]
        writer.add_tensor(tensor.name, np.ascontiguousarray(kept, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
