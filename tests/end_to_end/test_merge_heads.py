"""`mergekit-neuron merge --head` as installed: what it writes is verified, evaluated and told of as users do it."""

import json
import shutil

import torch
import transformers
import yaml
from PIL import Image

from tests.support import tiny
from tests.support.commands import run


def save(folder, name, labels, seed):
    architecture, config = tiny.config_of("vit")
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / name)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / name)


def test_a_merge_with_an_experts_head_is_verified_and_evaluated(tmp_path):
    save(tmp_path, "base", ["yes", "no"], 0)
    save(tmp_path, "pets", list(tiny.LABELS), 1)
    save(tmp_path, "digits", ["0", "1", "2", "3", "4"], 2)
    tiny.write_images(tmp_path / "images", 4)
    models = [{"model": "pets"}, {"model": "digits"}]
    (tmp_path / "merge.yml").write_text(
        yaml.safe_dump({"merge_method": "neuro_merging", "base_model": "base", "models": models})
    )
    (tmp_path / "tasks.yml").write_text(
        yaml.safe_dump(
            {
                "tasks": [
                    {"name": "pets", "kind": "image-classification", "data": {"source": "images", "split": "train"}}
                ]
            }
        )
    )

    refused = run("mergekit-neuron", "merge", "merge.yml", "out", folder=tmp_path)
    assert refused.returncode == 1 and refused.stderr.startswith("error: classifier.weight: the heads differ in shape")
    assert len(refused.stderr.splitlines()) == 1

    planned = run("mergekit-neuron", "merge", "merge.yml", "out", "--head", "keep", "--dry-run", folder=tmp_path)
    assert "  heads kept: heads/pets.safetensors of pets (cat, dog, tree)" in planned.stdout
    assert not (tmp_path / "out").exists()

    merged = run("mergekit-neuron", "merge", "merge.yml", "out", "--head", "pets", folder=tmp_path)
    assert "bodies merged: a ViTForImageClassification with the head of pets (cat, dog, tree)" in merged.stdout
    verified = run("mergekit-neuron", "verify", "out", folder=tmp_path)
    assert verified.returncode == 0, verified.stderr
    scored = run("mergekit-neuron", "evaluate", "out", "--task", "tasks.yml", "-o", "out.json", folder=tmp_path)
    assert scored.returncode == 0, scored.stderr
    (task,) = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert task["count"] == 12

    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "base")
    right = 0
    for file in sorted((tmp_path / "images").rglob("*.png")):
        with torch.no_grad():
            logits = model(**processor(Image.open(file).convert("RGB"), return_tensors="pt")).logits
        right += model.config.id2label[int(logits.argmax())] == file.parent.name
    assert task["score"] == right / 12

    kept = run("mergekit-neuron", "merge", "merge.yml", "out", "--head", "keep", "--force", folder=tmp_path)
    assert kept.returncode == 0, kept.stderr
    verified = run("mergekit-neuron", "verify", "out", folder=tmp_path)
    assert "with a head in heads/ it is a whole model: digits, pets" in verified.stdout
    shutil.copytree(tmp_path / "out", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "heads" / "pets.safetensors").unlink()
    damaged = run("mergekit-neuron", "verify", "elsewhere", folder=tmp_path)
    assert damaged.returncode == 1 and "heads/pets.safetensors" in damaged.stderr


def test_a_head_and_an_adapter_do_not_go_together(tmp_path):
    done = run("mergekit-neuron", "merge", "merge.yml", "out", "--as-adapter", "--head", "drop", folder=tmp_path)
    assert done.returncode == 2
    assert "--head drop does not go with --as-adapter: an adapter changes the weights of its base" in done.stderr
