"""LoRA adapters in, read lazily tensor by tensor, and out, factored from a merged update."""
