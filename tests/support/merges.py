"""Merges of a tiny family in this process, and how their tensors are compared."""

from pathlib import Path

import torch
from mergekit.options import MergeOptions

from neuron_methods.plugin.merging import merge_to_directory
from tests.support.checkpoints import configuration, edit, read

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
EXPERTS = ("expert-a", "expert-b")


def merge(source=None, out="out", **options):
    arguments = {key: options.pop(key) for key in ("force", "allow_nonfinite", "profile_out") if key in options}
    return merge_to_directory(
        source or configuration(), out, progress=False, options=MergeOptions(**options), **arguments
    )


def merged(source=None, out="out", **options):
    merge(source, out, **options)
    return read(Path(out))


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def close(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), atol=atol, rtol=0, msg=name)


def spoil(path, value, name=UP, at=(2, 3)):
    edit(path, lambda tensors: tensors[name].__setitem__(at, value))
