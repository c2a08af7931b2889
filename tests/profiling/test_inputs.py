"""Inputs of modules against those of every sample alone, unpadded, kept whole and multiplied in float64."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn import functional

from neuron_methods.data.sources import Sample, SourceReader, parse_source
from neuron_methods.data.texts import TextFeeder
from neuron_methods.methods.inputs_file import InputsFile
from neuron_methods.profiling import InputSettings, NeuronProfile, Settings, inputs, measure_inputs, measure_profile
from neuron_methods.profiling.checkpoint import Checkpoint
from neuron_methods.profiling.module_inputs import linear_modules
from neuron_methods.support.errors import UserError
from tests.support import tiny
from tests.support.checkpoints import read
from tests.support.merges import merge
from tests.support.routed import save_adapter

COUNT = 11
CONVOLUTION = "vit.embeddings.patch_embeddings.projection"


class Whole:
    """Keeps what the linear modules of a model are given, sample by sample: path -> [(vectors, inputs), ...]."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.eval()
        self.given: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        for path, module in model.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, transformers.pytorch_utils.Conv1D)):
                module.register_forward_pre_hook(self._keep(path, module))

    def _keep(self, path, module):
        def hook(_, arguments):
            given = arguments[0].detach()
            if isinstance(module, torch.nn.Conv2d):
                given = functional.unfold(given, module.kernel_size, stride=module.stride).mT
            self.given[path].append(given.reshape(-1, given.shape[-1]).double())

        return hook

    def run(self, **arguments) -> None:
        with torch.no_grad():
            self.model(**arguments)

    def moment(self, path: str, weights: list[float] | None = None) -> tuple[torch.Tensor, int]:
        """The mean of x xᵀ, and how many x there were."""
        parts = self.given[path]
        scaled = parts if weights is None else [p * w for p, w in zip(parts, weights, strict=True)]
        vectors = torch.cat(scaled)
        return vectors.T @ vectors / len(vectors), len(vectors)


def load(folder: Path) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder)


def save_gpt2(folder: Path) -> Path:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tiny.TOKENS))
    model.save_pretrained(folder)
    tiny.build_tokenizer(bos=True).save_pretrained(folder)
    return folder


def pixels(paths: list[Path], size: int = 8) -> torch.Tensor:
    from PIL import Image

    processor = transformers.ViTImageProcessor(size={"height": size, "width": size})
    return processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]


def text_case(kind: str, tmp_path: Path) -> tuple[Path, str, Whole]:
    """A model, data for it, and what its modules are given."""
    folder = save_gpt2(tmp_path / "m") if kind == "gpt2" else tiny.save_model(kind, tmp_path / "m", bos=True)
    data, whole = tiny.write_texts(tmp_path / "texts.jsonl", COUNT), Whole(load(folder))
    tokenizer = tiny.build_tokenizer(bos=True)
    for text, target in zip(tiny.sentences(COUNT, 0), tiny.sentences(COUNT, 1), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        if kind.startswith("t5"):
            whole.run(input_ids=ids, labels=tokenizer(target, return_tensors="pt")["input_ids"])
        else:
            whole.run(input_ids=ids)
    return folder, f"words={data}:{'input,target' if kind.startswith('t5') else 'text'}", whole


def vit_case(tmp_path: Path) -> tuple[Path, str, Whole]:
    folder, images = tiny.save_model("vit", tmp_path / "m"), tiny.write_images(tmp_path / "images", 3)
    whole = Whole(load(folder))
    for path in sorted(images.rglob("*.png")):
        whole.run(pixel_values=pixels([path]))
    return folder, f"pictures={images}", whole


def clip_case(tmp_path: Path) -> tuple[Path, str, Whole]:
    folder, images = tiny.save_model("clip", tmp_path / "m"), tiny.write_images(tmp_path / "images", 2)
    captions = tiny.sentences(6, 5)
    paths = sorted(images.rglob("*.png"))
    rows = [
        {"file_name": str(path.relative_to(images)), "text": text} for path, text in zip(paths, captions, strict=True)
    ]
    tiny.write_jsonl(images / "metadata.jsonl", rows)
    whole, model = Whole(load(folder)), transformers.AutoProcessor.from_pretrained(folder)
    from PIL import Image

    for path, text in zip(paths, captions, strict=True):
        whole.run(**model(text=[text], images=[Image.open(path)], return_tensors="pt"))
    return folder, f"both={images}:image,text", whole


CASES = {
    **{kind: lambda path, kind=kind: text_case(kind, path) for kind in ("llama", "phi3", "gpt2", "t5", "t5-gated")},
    "vit": vit_case,
    "clip": clip_case,
}


def measured(folder: Path | str, data: str | list[str], output: Path, **settings) -> InputsFile:
    measure_inputs(
        str(folder), [data] if isinstance(data, str) else data, output, InputSettings(**{"samples": 0, **settings})
    )
    return InputsFile.open(str(output))


def assert_is(file: InputsFile, path: str, moment: torch.Tensor, tokens: int | None = None) -> None:
    """FᵀF is `moment`, but for what rounding F to bfloat16 may do to it: 2⁻⁸ of each factor of each product."""
    factor = file.read(file.info.modules[path])
    assert factor.dtype == torch.bfloat16
    assert len(factor) <= factor.shape[1] or len(factor) == tokens
    found, lengths = factor.double().T @ factor.double(), moment.diagonal().sqrt()
    bound = 1.02 * 2**-7 * lengths[:, None] * lengths + 1e-6 * float(moment.diagonal().max())
    assert bool(((found - moment).abs() <= bound).all()), path
    if tokens is not None:
        assert file.info.tokens[file.info.modules[path]] == tokens


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", CASES)
def test_second_moments(kind, batch_size, tmp_path):
    folder, data, whole = CASES[kind](tmp_path)
    file = measured(folder, data, tmp_path / "i.safetensors", batch_size=batch_size)
    expected = {path for path in whole.given if whole.given[path]}
    assert set(file.info.modules) == expected == set(linear_modules(whole.model))
    for path in expected:
        assert_is(file, path, *whole.moment(path))
    assert all(lost == 0 for lost in file.info.lost.values())


@pytest.mark.parametrize(
    ("kind", "together", "apart"),
    [
        (
            "llama",
            [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]],
            ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"],
        ),
        (
            "t5",
            [["layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"]],
            ["layer.0.SelfAttention.k", "layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k"],
        ),
    ],
)
def test_modules_that_read_the_same_share_a_factor(kind, together, apart, tmp_path):
    folder, data, _ = CASES[kind](tmp_path)
    file = measured(folder, data, tmp_path / "i.safetensors")
    prefix = "model.layers.1." if kind == "llama" else "decoder.block.1."
    for names in together:
        assert len({file.info.modules[prefix + name] for name in names}) == 1
    assert len({file.info.modules[prefix + name] for name in apart}) == len(apart)
    assert len(file._file.keys()) == len(set(file.info.modules.values()))


@contextmanager
def hooked(monkeypatch, path, change):
    """Let a module of the model that is measured be given something else."""
    opened = inputs.opened_model

    @contextmanager
    def open_changed(*arguments, **keywords):
        with opened(*arguments, **keywords) as (model, device):
            model.get_submodule(path).register_forward_pre_hook(lambda _, given: (change(given[0]),))
            yield model, device

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "opened_model", open_changed)
        yield


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"])
def test_modules_that_stop_sharing_are_measured_apart_from_the_first_sample_on(path, llama, tmp_path, monkeypatch):
    """In batches of three, the last of two, where one of them is given twice as much."""
    data, whole = tiny.write_texts(tmp_path / "t.jsonl", COUNT), Whole(load(llama))
    drawn = [sample.values[0] for sample in inputs.SourceReader(one_source(data), ("text",)).samples(0, 0)]
    tokenizer = tiny.build_tokenizer(bos=True)
    for text in drawn:
        whole.run(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
    with hooked(monkeypatch, path, lambda given: given * 2 if len(given) == 2 else given):
        file = measured(llama, f"a={data}", tmp_path / "i.safetensors", batch_size=3)
    others = {"q_proj", "k_proj", "v_proj"} - {path.rpartition(".")[2]}
    expected, tokens = whole.moment(path, [1.0] * 9 + [2.0] * 2)
    assert_is(file, path, expected, tokens)
    for name in others:
        assert_is(file, f"model.layers.0.self_attn.{name}", *whole.moment(f"model.layers.0.self_attn.{name}"))
    assert len({file.info.modules[f"model.layers.0.self_attn.{name}"] for name in others}) == 1


def one_source(path: Path):
    return inputs.parse_sources([f"a={path}:text"])[0]


def test_what_cannot_be_told_from_padding_is_left_out(llama, texts, tmp_path, monkeypatch):
    said: list[str] = []
    output = tmp_path / "i.safetensors"
    with hooked(monkeypatch, "lm_head", lambda given: given[:, 1:]):
        measure_inputs(str(llama), [f"a={texts}"], output, InputSettings(), report=said.append)
        alone = measured(llama, f"a={texts}", tmp_path / "alone.safetensors", batch_size=1)
    file = InputsFile.open(str(output))
    assert set(linear_modules(load(llama))) - set(file.info.modules) == {"lm_head"}
    assert any("cannot be told from padding: lm_head; --batch-size 1" in line for line in said)
    assert "lm_head" in alone.info.modules


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_a_factor_of_fewer_rows_keeps_to_what_it_says(rows, tmp_path):
    folder, data, whole = CASES["llama"](tmp_path)
    file = measured(folder, data, tmp_path / "i.safetensors", rows=rows)
    for path, factor in file.info.modules.items():
        moment, tokens = whole.moment(path)
        found = file.read(factor).double()
        assert len(found) <= rows
        energy, lost = float(moment.trace()), file.info.lost[factor]
        gaps = torch.linalg.eigvalsh(moment - found.T @ found)
        rounding = 2**-8 * energy
        assert -rounding <= gaps[0] and gaps[-1] <= lost * energy + rounding
        assert lost <= 1 / (rows + 1) and (lost > 0) == (rows < moment.shape[0] and tokens > rows)


def test_a_model_larger_than_memory_is_offloaded_to_disk(llama, texts, tmp_path):
    output = tmp_path / "offloaded.safetensors"
    measure_inputs(str(llama), [f"a={texts}"], output, InputSettings(), max_memory={"cpu": 9000})
    whole = measured(llama, f"a={texts}", tmp_path / "whole.safetensors")
    assert_same(InputsFile.open(str(output)), whole)
    assert InputsFile.open(str(output)).info.modules == whole.info.modules


def test_sources_are_one_stream(llama, tmp_path):
    first, second = (tiny.write_texts(tmp_path / f"{seed}.jsonl", 6, seed=seed) for seed in (3, 8))
    both = tmp_path / "both.jsonl"
    both.write_text(first.read_text() + second.read_text())
    apart = measured(llama, [f"a={first}", f"b={second}"], tmp_path / "apart.safetensors")
    one = measured(llama, f"a={both}", tmp_path / "one.safetensors")
    assert apart.info.made_from["samples"] == {"a": 6, "b": 6}
    assert_same(apart, one)


def assert_same(one: InputsFile, other: InputsFile, share: float = 0.0) -> None:
    """The same second moments of the same modules, but for rounding and `share` of ‖F‖²."""
    assert one.info.modules.keys() == other.info.modules.keys()
    for path, factor in one.info.modules.items():
        assert one.info.tokens[factor] == other.info.tokens[other.info.modules[path]]
        moments = [f.double().T @ f.double() for f in (one.read(factor), other.read(other.info.modules[path]))]
        energy = float(moments[0].trace())
        assert float(torch.linalg.matrix_norm(moments[0] - moments[1], 2)) <= (share + 2**-7) * energy, path


def test_of_a_decoder_answers_alone(llama, tmp_path):
    """Where a target is said: from the last token of the prompt to the last but one of the answer."""
    data, whole = tiny.write_texts(tmp_path / "t.jsonl", COUNT), Whole(load(llama))
    tokenizer, starts = tiny.build_tokenizer(bos=True), []
    for text, target in zip(tiny.sentences(COUNT, 0), tiny.sentences(COUNT, 1), strict=True):
        prompt = tokenizer(text + " or ")["input_ids"]
        answer = tokenizer(target, add_special_tokens=False)["input_ids"]
        whole.run(input_ids=torch.tensor([prompt + answer]))
        starts.append(len(prompt) - 1)
    options = {"separator": " or ", "batch_size": 4}
    file = measured(llama, f"a={data}:input,target", tmp_path / "all.safetensors", **options)
    for path in file.info.modules:
        assert_is(file, path, *whole.moment(path))
    for parts in whole.given.values():
        parts[:] = [part[start:-1] for part, start in zip(parts, starts, strict=True)]
    file = measured(llama, f"a={data}:input,target", tmp_path / "i.safetensors", answers_only=True, **options)
    for path in file.info.modules:
        assert_is(file, path, *whole.moment(path))


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("columns", ["input", "input,target"])
def test_a_decoder_answers_by_itself(columns, answers_only, llama, tmp_path):
    data, model = tiny.write_texts(tmp_path / "t.jsonl", COUNT), load(llama)
    tokenizer, answered = tiny.build_tokenizer(bos=True), []
    separator = " or " if "," in columns else ""
    for text in tiny.sentences(COUNT, 0):
        ids = tokenizer(text + separator, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        answered.append((ids.shape[1], model.generate(ids, **options)))
    whole = Whole(model)
    for _, ids in answered:
        whole.run(input_ids=ids)
    if answers_only:
        for parts in whole.given.values():
            parts[:] = [part[start - 1 : -1] for part, (start, _) in zip(parts, answered, strict=True)]
    settings = {"generate": 5, "batch_size": 4, "separator": " or ", "answers_only": answers_only}
    file = measured(llama, f"a={data}:{columns}", tmp_path / "i.safetensors", **settings)
    for path in file.info.modules:
        assert_is(file, path, *whole.moment(path))


@pytest.mark.parametrize("columns", ["input", "input,target"])
def test_a_prompt_has_the_tokens_of_training_whether_an_answer_follows_or_not(columns, tmp_path):
    """Where a space parts the two it is the answer's, as in the demo's training."""
    words = sorted({word for seed in (0, 1) for text in tiny.sentences(3, seed) for word in text.split()})
    vocabulary = {token: i for i, token in enumerate(["?", " ", *words, *(f" {word}" for word in words)])}
    spelled = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    spelled.pre_tokenizer = Split(Regex(r" ?\S+| +"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=spelled, unk_token="?")
    feeder = TextFeeder(tokenizer, 64, 0, True, " ")
    source = parse_source(f"a={tiny.write_texts(tmp_path / 't.jsonl', 3)}:{columns}")
    feeder.start(SourceReader(source, feeder.columns), False)
    asked, said = tiny.sentences(3, 0), tiny.sentences(3, 1)
    samples = [Sample(i, i, (asked[i], said[i])) for i in range(3)]
    prompts = [tokenizer(text)["input_ids"] for text in asked]
    assert feeder.prompts(samples) == prompts
    whole = [tokenizer(f"{a} {b}" if "," in columns else a)["input_ids"] for a, b in zip(asked, said, strict=True)]
    found = feeder.batch(samples).inputs
    masked = zip(found["input_ids"], found["attention_mask"].bool(), strict=True)
    assert [ids[mask].tolist() for ids, mask in masked] == whole
    assert [ids[: len(prompt)] for ids, prompt in zip(whole, prompts, strict=True)] == prompts


def test_a_text_to_text_model_answers_by_itself(tmp_path):
    folder = tiny.save_model("t5", tmp_path / "m", bos=True)
    data, model = tiny.write_texts(tmp_path / "t.jsonl", COUNT), load(folder)
    tokenizer, answered = tiny.build_tokenizer(bos=True), []
    for text in tiny.sentences(COUNT, 0):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        answered.append((ids, model.generate(ids, max_new_tokens=5, do_sample=False)[:, 1:]))
    whole = Whole(model)
    for ids, answer in answered:
        whole.run(input_ids=ids, labels=answer)
    file = measured(folder, f"a={data}:input", tmp_path / "i.safetensors", generate=5, batch_size=4)
    for path in file.info.modules:
        assert_is(file, path, *whole.moment(path))


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_measured_as_the_model_it_makes(alone, llama, texts, tmp_path):
    from peft import PeftModel

    adapter = save_adapter(llama, "llama", tmp_path / "adapter", seed=1)
    merged = PeftModel.from_pretrained(load(llama), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny.build_tokenizer(bos=True).save_pretrained(tmp_path / "merged")
    name = str(adapter) if alone else f"{llama}+{adapter}"
    found = measured(name, f"a={texts}", tmp_path / "adapter.safetensors")
    expected = measured(tmp_path / "merged", f"a={texts}", tmp_path / "whole.safetensors")
    assert found.info.model == f"{llama.name}+adapter"
    assert_same(found, expected)


@pytest.mark.parametrize("rows", [64, 5])
def test_two_processes_measure_as_one(rows, llama, texts, tmp_path):
    one, two = measured(llama, f"a={texts}", tmp_path / "one.safetensors", rows=rows), tmp_path / "two.safetensors"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    measure = ["-m", "neuron_methods", "profile", str(llama), "--data", f"a={texts}", "--inputs", "-o", str(two)]
    options = ["--samples", "0", "--batch-size", "3", "--rows", str(rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*launch, *measure, *options], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(r"^a: 20 samples, 2 processes$", run.stdout, re.MULTILINE)
    assert run.stdout.count("inputs of 15 linear modules") == 1  # one of them speaks
    file = InputsFile.open(str(two))
    assert_same(file, one, share=0.0 if rows == 64 else 1 / (rows + 1))
    assert len(file._file.keys()) == len(one._file.keys())


def test_a_process_without_a_sample_agrees_to_all(llama, tmp_path):
    texts = tiny.write_texts(tmp_path / "one.jsonl", 1)
    one, two = measured(llama, f"a={texts}", tmp_path / "one.safetensors"), tmp_path / "two.safetensors"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    measure = ["-m", "neuron_methods", "profile", str(llama), "--data", f"a={texts}", "--inputs", "-o", str(two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*launch, *measure], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert_same(InputsFile.open(str(two)), one)
    assert InputsFile.open(str(two)).info.modules == one.info.modules


@pytest.mark.parametrize("rows", [64, 5])
def test_an_interrupted_run_goes_on_where_it_was(rows, llama, texts, tmp_path, monkeypatch):
    other, output = tiny.write_texts(tmp_path / "other.jsonl", 5, seed=7), tmp_path / "i.safetensors"
    data, options = [f"a={texts}", f"b={other}"], {"batch_size": 3, "rows": rows, "checkpoint_seconds": 0}
    whole = measured(llama, data, tmp_path / "whole.safetensors", **options)
    save, calls = Checkpoint.save_if_due, []

    def save_then_stop(self, recorder, batches):
        save(self, recorder, batches)
        calls.append(batches)
        if batches == 8:  # the first of the second source
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save_if_due", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            measured(llama, data, output, **options)
    assert not output.exists()
    monkeypatch.setattr(Checkpoint, "save_if_due", lambda self, recorder, batches: calls.append(batches))
    file = measured(llama, data, output, **options)
    assert calls == list(range(1, 10))  # none of them twice
    assert_same(file, whole)
    assert file.info.tokens == whole.info.tokens and file.info.made_from == whole.info.made_from
    assert [path.name for path in tmp_path.glob("i.*")] == ["i.safetensors"]


def test_what_is_measured_already_is_not_measured_again(llama, texts, tmp_path):
    output, said = tmp_path / "i.safetensors", []
    measure_inputs(str(llama), [f"a={texts}"], output)
    before = output.stat().st_mtime_ns
    measure_inputs(str(llama), [f"a={texts}"], output, report=said.append)
    assert said == ["a: already in i.safetensors, skipped"] and output.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"-o .*measured otherwise .settings: rows.; .* or give --force"):
        measure_inputs(str(llama), [f"a={texts}"], output, InputSettings(rows=3))
    measure_inputs(str(llama), [f"a={texts}"], output, InputSettings(rows=3), force=True)
    assert InputsFile.open(str(output)).info.made_from["settings"]["rows"] == 3


def test_sizes_are_said_before_the_first_sample(llama, texts, tmp_path):
    """Of tensors, at most: 2 bytes on disk and 4 in memory, where twice the rows have their place."""
    said: list[str] = []
    output = tmp_path / "i.safetensors"
    measure_inputs(str(llama), [f"a={texts}"], output, InputSettings(samples=0), report=said.append)
    assert re.fullmatch(r"inputs of 15 linear modules, 9 of them different, 16 to 24 wide: up to 24 rows .*", said[0])
    assert "at most 5.9 kB on disk and 23.6 kB in memory" in said[0]
    tensors = load_file(output)
    assert sum(2 * tensor.numel() for tensor in tensors.values()) == 2 * (7 * 16**2 + 2 * 24**2) == 5888


class TestMistakes:
    def refused(self, match: str, model, data: str, output: Path, **settings) -> None:
        with pytest.raises(UserError, match=match) as caught:
            measure_inputs(str(model), [data], output, InputSettings(**settings))
        assert "\n" not in str(caught.value) and not output.exists()

    def test_a_profile_of_neurons_in_the_place(self, llama, texts, tmp_path):
        output = tmp_path / "p.safetensors"
        measure_profile(str(llama), [f"a={texts}"], output, Settings(top=1))
        with pytest.raises(UserError, match=r"-o .*p.safetensors: exists and is something else, which is not replaced"):
            measure_inputs(str(llama), [f"a={texts}"], output)

    def test_inputs_where_a_profile_of_neurons_is_wanted(self, llama, texts, tmp_path):
        output = tmp_path / "i.safetensors"
        measure_inputs(str(llama), [f"a={texts}"], output)
        wanted = "is no profile of neurons .a file of the format 'mergekit-neuron inputs'.*without --inputs"
        with pytest.raises(UserError, match=wanted):
            NeuronProfile.load(output)
        with pytest.raises(UserError, match="exists and is something else, which is not replaced"):
            measure_profile(str(llama), [f"a={texts}"], output)

    def test_a_decoder_without_answers(self, tmp_path):
        model, texts = tiny.save_model("t5", tmp_path / "t5"), tiny.write_texts(tmp_path / "t.jsonl", 3)
        self.refused(
            "let the model answer by itself: --generate", model, f"a={texts}:input", tmp_path / "i.safetensors"
        )

    def test_answers_only_without_answers(self, llama, texts, tmp_path):
        output = tmp_path / "i.safetensors"
        self.refused("--answers-only needs a column of prompts", llama, f"a={texts}", output, answers_only=True)

    def test_answers_of_an_image_classifier(self, tmp_path):
        model, images = tiny.save_model("vit", tmp_path / "vit"), tiny.write_images(tmp_path / "images", 1)
        for option, name in ({"generate": 3}, "--generate"), ({"answers_only": True}, "--answers-only"):
            found = f"{name}: ViTForImageClassification .*leave it away"
            self.refused(found, model, f"a={images}", tmp_path / "i.safetensors", **option)

    def test_answers_longer_than_texts(self, llama, texts, tmp_path):
        options = {"generate": 20, "max_length": 20}
        self.refused("leaves none for a prompt", llama, f"a={texts}", tmp_path / "i.safetensors", **options)

    def test_inputs_that_are_no_numbers(self, llama, texts, tmp_path):
        import shutil

        shutil.copytree(llama, tmp_path / "m")
        tensors = load_file(tmp_path / "m/model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = math.nan
        save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
        found = r"model.layers.0.mlp.up_proj.weight holds NaN or Inf; use a sound checkpoint"
        self.refused(found, tmp_path / "m", f"a={texts}", tmp_path / "i.safetensors")

    def test_rows_that_are_all_empty(self, llama, tmp_path):
        data = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": ""}])
        self.refused("all its rows are empty", llama, f"a={data}", tmp_path / "i.safetensors")


def test_a_merge_reads_them(tmp_path, monkeypatch):
    """Where an expert has been measured its merge differs, and as it says: with all weight on it, it comes back."""
    monkeypatch.chdir(tmp_path)
    tiny.save_experts(tmp_path)
    for name in ("expert-a", "expert-b"):
        texts = tiny.write_texts(tmp_path / f"{name}.jsonl", 30, seed=ord(name[-1]))
        measured(tmp_path / name, f"a={texts}", tmp_path / f"{name}.safetensors")

    def written(out: str, source: str) -> dict[str, torch.Tensor]:
        asked = "" if source == "update" else ", profile: ./NAME.safetensors"
        models = "".join(
            f"  - model: ./{name}\n    parameters: {{inputs: {source}{asked}}}\n".replace("NAME", name)
            for name in ("expert-a", "expert-b")
        )
        merge(f"merge_method: neuron_response\nbase_model: ./base\nmodels:\n{models}dtype: float32\n", out)
        return read(tmp_path / out)

    results = [written(source, source) for source in ("update", "profile", "both", "auto")]
    name = "model.layers.0.mlp.up_proj.weight"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((results[one][name] - results[other][name]).abs().max()) > 1e-3
    assert torch.equal(results[2][name], results[3][name])
