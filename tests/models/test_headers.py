"""Shapes and dtypes of what a directory stores, by its index or its single file, and what cannot be read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from neuron_methods.models.headers import Header, HeaderFiles, stored_headers
from neuron_methods.support.errors import UserError

TENSORS = {"a": torch.zeros(3, 2), "b": torch.zeros((), dtype=torch.bfloat16), "c": torch.zeros(4, dtype=torch.bool)}
HEADERS = {name: Header.of(tensor) for name, tensor in TENSORS.items()}


def test_a_header_knows_its_size():
    assert [(h.entries, h.bytes) for h in HEADERS.values()] == [(6, 24), (1, 2), (4, 4)]


@pytest.mark.parametrize("stem", ["model.safetensors", "adapter_model.safetensors", "pytorch_model.bin"])
def test_whole_and_in_shards_the_headers_are_the_same(tmp_path, stem):
    save = torch.save if stem.endswith(".bin") else save_file
    save(TENSORS, tmp_path / stem)
    assert stored_headers(tmp_path, stem) == HEADERS
    (tmp_path / stem).unlink()
    files = {"a": "one", "b": "one", "c": "two"}
    for file in ("one", "two"):
        save({name: TENSORS[name] for name in TENSORS if files[name] == file}, tmp_path / file)
    (tmp_path / f"{stem}.index.json").write_text(json.dumps({"weight_map": files}))
    assert stored_headers(tmp_path, stem) == HEADERS


def test_what_is_not_there_or_not_whole_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no weights in it"):
        stored_headers(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    with pytest.raises(UserError, match=f"^{file}: the index promises tensor z, but the file does not hold it"):
        HeaderFiles().read(str(file), "z")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"^{file}: not a complete safetensors file"):
        stored_headers(tmp_path)
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"a pickle \(.bin\).* merge it again without --no-safe-serialization"):
        stored_headers(tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model.bin: cannot be read back"):
        stored_headers(tmp_path, "pytorch_model.bin")


def test_a_dtype_that_nothing_merges(tmp_path):
    save_file({"a": torch.zeros(2).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor a is stored as F8_E5M2, which no merge method takes"):
        stored_headers(tmp_path)
