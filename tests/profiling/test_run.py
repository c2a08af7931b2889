"""Whole runs: resuming, splitting among processes, placing, bounded memory, and the user's mistakes."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tracemalloc

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from neuron_methods.data.making import make_feeder
from neuron_methods.data.sources import Sample, SourceReader, parse_source
from neuron_methods.evaluation.models import open_model
from neuron_methods.models.reference import ModelName
from neuron_methods.neurons.profile_file import exemplars_path
from neuron_methods.profiling import NeuronProfile, Settings, measure_profile
from neuron_methods.profiling.checkpoint import Checkpoint
from neuron_methods.profiling.measured_model import load_model
from neuron_methods.profiling.recorder import Recorder
from neuron_methods.support.errors import UserError
from tests.support import tiny
from tests.support.routed import save_adapter

SETTINGS = Settings(batch_size=3, top=4, gradients=True)


def assert_same(left: NeuronProfile, right: NeuronProfile) -> None:
    """Equal to float rounding, exemplars included."""
    assert set(left.tensors) == set(right.tensors)
    assert left.info.sources == right.info.sources
    for source in left.sources:
        for layer, neurons in left.layers.items():
            for name in left.info.statistics:
                pair = (profile.statistic(name, source, layer) for profile in (left, right))
                torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-9)
            for neuron in range(neurons):
                found, expected = (profile.exemplars(source, layer, neuron) for profile in (left, right))
                for one, other in zip(found, expected, strict=True):
                    assert one.activation == pytest.approx(other.activation, rel=1e-5)
                    assert (one.row, one.position, one.text) == (other.row, other.position, other.text)


def test_finished_sources_are_not_measured_again(llama, texts, tmp_path):
    output, said = tmp_path / "p.safetensors", []
    measure_profile(str(llama), [f"a={texts}"], output, SETTINGS)
    before = NeuronProfile.load(output)
    other = tiny.write_texts(tmp_path / "other.jsonl", 5, seed=7)
    data = [f"a={texts}", f"b={other}"]
    measure_profile(str(llama), data, output, SETTINGS, report=said.append)
    after = NeuronProfile.load(output)

    assert said == ["a: already in p.safetensors, skipped", f"b: 5 samples, {after.tokens('b', 'layers.0')} tokens"]
    assert after.sources == ("a", "b")
    assert after.info.exemplars > before.info.exemplars
    for name, tensor in before.tensors.items():
        assert torch.equal(after.tensors[name], tensor)
    assert after.exemplars("a", "layers.1", 2) == before.exemplars("a", "layers.1", 2)
    both = tmp_path / "both.safetensors"
    measure_profile(str(llama), data, both, SETTINGS)
    assert_same(NeuronProfile.load(both), after)


def test_an_interrupted_source_goes_on_where_it_was(llama, texts, tmp_path, monkeypatch):
    output, whole = tmp_path / "p.safetensors", tmp_path / "whole.safetensors"
    measure_profile(str(llama), [f"a={texts}"], whole, SETTINGS)
    save, calls = Checkpoint.save_if_due, []

    def save_then_stop(self, recorder, batches):
        save(self, recorder, batches)
        calls.append(batches)
        if batches == 4:
            raise KeyboardInterrupt

    settings = Settings(batch_size=3, top=4, gradients=True, checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save_if_due", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            measure_profile(str(llama), [f"a={texts}"], output, settings)
    assert not output.exists()

    monkeypatch.setattr(Checkpoint, "save_if_due", lambda self, recorder, batches: calls.append(batches))
    measure_profile(str(llama), [f"a={texts}"], output, settings)
    assert calls == [1, 2, 3, 4, 5, 6, 7]  # none of them twice
    assert_same(NeuronProfile.load(output), NeuronProfile.load(whole))
    assert sorted(path.name for path in tmp_path.glob("p.*")) == ["p.exemplars.jsonl", "p.safetensors"]


def test_the_state_of_another_measurement_is_passed_over(llama, texts, tmp_path, monkeypatch):
    output = tmp_path / "p.safetensors"
    settings = Settings(batch_size=3, top=4, checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "remove", lambda self: None)
        measure_profile(str(llama), [f"a={texts}"], tmp_path / "p.safetensors", settings)
    (left,) = tmp_path.glob("*.unfinished-*")
    assert left.exists()
    another = Settings(batch_size=3, top=4, seed=1, samples=5)
    measure_profile(str(llama), [f"a={texts}"], output, another, force=True)
    assert NeuronProfile.load(output).info.sources["a"].samples == 5


def test_four_processes_give_the_profile_of_one(llama, texts, tmp_path):
    one, four = tmp_path / "one.safetensors", tmp_path / "four.safetensors"
    measure_profile(str(llama), [f"a={texts}"], one, SETTINGS)
    # Without --multi_gpu accelerate 1.15 leaves several processes on a CPU to mpirun, and starts one itself.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "4"]
    measure = ["-m", "neuron_methods", "profile", str(llama), "--data", f"a={texts}", "-o", str(four)]
    options = ["--batch-size", "3", "--top", "4", "--gradients"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([*launch, *measure, *options], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.fullmatch(r"a: 20 samples, \d+ tokens, 4 processes\n", run.stdout)  # one of them speaks
    assert_same(NeuronProfile.load(four), NeuronProfile.load(one))


def test_an_adapter_is_measured_as_if_it_were_merged(llama, texts, tmp_path):
    with load_model(ModelName.parse(str(llama)), "float32") as loaded:
        wrapper = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["up_proj", "gate_proj", "q_proj"]))
    for name, parameter in wrapper.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapper.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    with load_model(ModelName.parse(str(llama)), "float32") as loaded:
        PeftModel.from_pretrained(loaded.model, tmp_path / "adapter").merge_and_unload().save_pretrained(merged)
    tiny.build_tokenizer(bos=True).save_pretrained(merged)

    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "adapter", "merged")]
    for model, path in zip((llama, f"{llama}+{tmp_path / 'adapter'}", merged), paths, strict=True):
        measure_profile(str(model), [f"a={texts}"], path, SETTINGS)
    base, adapter, merged = map(NeuronProfile.load, paths)
    assert adapter.info.model == f"{llama.name}+adapter"
    assert not torch.allclose(*(p.statistic("mean_abs", "a", "layers.0") for p in (base, adapter)), rtol=0.01)
    for layer in adapter.layers:
        for name in adapter.info.statistics:
            pair = (profile.statistic(name, "a", layer) for profile in (adapter, merged))
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("base", ["{llama}", "../base"])
def test_an_adapter_by_itself_is_measured_on_the_base_it_names(base, llama, texts, tmp_path):
    shutil.copytree(llama, tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", "llama", tmp_path / "adapter", seed=1)
    file = adapter / "adapter_config.json"
    named = base.format(llama=llama)
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
    measure_profile(str(adapter), [f"a={texts}"], tmp_path / "alone.safetensors", SETTINGS)
    measure_profile(f"{llama}+{adapter}", [f"a={texts}"], tmp_path / "both.safetensors", SETTINGS)
    assert_same(*(NeuronProfile.load(tmp_path / f"{name}.safetensors") for name in ("alone", "both")))


@pytest.mark.parametrize("command", ["profile", "evaluate"])
def test_an_adapter_that_does_not_fit_is_refused(command, llama, texts, tmp_path):
    adapter = save_adapter(llama, "llama", tmp_path / "adapter", seed=1)
    file = adapter / "adapter_model.safetensors"
    tensors = {key.replace("layers.1", "layers.7"): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="of its tensors found no place or are missing"):
        if command == "profile":
            measure_profile(f"{llama}+{adapter}", [f"a={texts}"], tmp_path / "p.safetensors", SETTINGS)
        else:
            with open_model(f"{llama}+{adapter}"):
                pass


def test_no_code_of_a_model_is_run_or_asked_about(llama, texts, tmp_path, monkeypatch):
    """transformers asks on stdin where it is not told."""
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    strange = {"model_type": "strange", "auto_map": {"AutoConfig": "configuration.Strange"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **strange}))
    (tmp_path / "model" / "configuration.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(UserError, match="cannot read its config"):
        measure_profile(str(tmp_path / "model"), [f"a={texts}"], tmp_path / "p.safetensors", SETTINGS)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_larger_than_memory_is_offloaded_to_disk(gradients, llama, texts, tmp_path):
    settings = Settings(batch_size=3, top=4, gradients=gradients)
    whole, offloaded = tmp_path / "whole.safetensors", tmp_path / "offloaded.safetensors"
    measure_profile(str(llama), [f"a={texts}"], whole, settings)
    bound = {"cpu": 9000}
    with load_model(ModelName.parse(str(llama)), "auto", bound) as loaded:
        assert "disk" in loaded.model.hf_device_map.values()
    measure_profile(str(llama), [f"a={texts}"], offloaded, settings, max_memory=bound)
    assert_same(NeuronProfile.load(offloaded), NeuronProfile.load(whole))


def test_an_adapter_on_a_base_that_does_not_fit_into_memory_is_refused(llama, texts, tmp_path):
    adapter = save_adapter(llama, "llama", tmp_path / "adapter", seed=1)
    with pytest.raises(UserError, match="merge the two into a directory first"):
        measure_profile(
            f"{llama}+{adapter}", [f"a={texts}"], tmp_path / "p.safetensors", SETTINGS, max_memory={"cpu": 9000}
        )


def test_memory_does_not_grow_with_the_number_of_samples(llama, texts):
    """Live tensors and Python objects after 60 and after 120 batches of fresh texts of equal length."""
    size, generator = 32, random.Random(3)

    def samples(batch: int) -> list[Sample]:
        orders = range(batch * size, (batch + 1) * size)
        return [Sample(order, order, (" ".join(generator.choices(tiny.WORDS, k=9)),)) for order in orders]

    def live() -> tuple[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()), tracemalloc.get_traced_memory()[0]

    with load_model(ModelName.parse(str(llama)), "float32") as loaded:
        feeder = make_feeder(ModelName.parse(str(llama)), loaded.model, 64, 4)
        feeder.start(SourceReader(parse_source(f"a={texts}"), feeder.columns), gradients=True)
        recorder = Recorder(loaded, feeder, 5, gradients=True)
        measured = []
        tracemalloc.start()
        try:
            with recorder.watching():
                for batch in range(1, 121):
                    recorder.run(feeder.batch(samples(batch)))
                    if batch in (60, 120):
                        measured.append(live())
        finally:
            tracemalloc.stop()
    (tensors_before, objects_before), (tensors_after, objects_after) = measured
    assert recorder.records["layers.0"].sums.tokens == 120 * size * 10
    # What was read in between: 150,000 bytes of token ids, as much of text.
    assert abs(tensors_after - tensors_before) < 10_000
    assert objects_after - objects_before < 40_000


class TestMistakes:
    def refused(self, match: str, *arguments, **keywords) -> None:
        with pytest.raises(UserError, match=match):
            measure_profile(*arguments, **keywords)

    def test_no_such_model(self, texts, tmp_path):
        self.refused(
            "model .*nowhere: cannot read its config",
            str(tmp_path / "nowhere"),
            [f"a={texts}"],
            tmp_path / "p.safetensors",
        )

    def test_another_suffix(self, llama, texts, tmp_path):
        self.refused("ends in .safetensors", str(llama), [f"a={texts}"], tmp_path / "p.json")

    def test_one_name_for_two_sources(self, llama, texts, tmp_path):
        self.refused("two data sources", str(llama), [f"a={texts}", f"a={texts}:input"], tmp_path / "p.safetensors")

    def test_a_profile_made_otherwise(self, llama, texts, tmp_path):
        output = tmp_path / "p.safetensors"
        measure_profile(str(llama), [f"a={texts}"], output, Settings(top=2))
        again = Settings(top=3, seed=1)
        self.refused(r"seed 0, now 1, top 2, now 3.*--force", str(llama), [f"a={texts}"], output, again)
        self.refused(
            "'a' on texts.jsonl, now it is texts.jsonl:input", str(llama), [f"a={texts}:input"], output, Settings(top=2)
        )
        measure_profile(str(llama), [f"a={texts}"], output, again, force=True)
        assert NeuronProfile.load(output).info.settings["top"] == 3

    def test_a_profile_without_its_exemplars(self, llama, texts, tmp_path):
        output = tmp_path / "p.safetensors"
        measure_profile(str(llama), [f"a={texts}"], output, Settings(top=2))
        exemplars_path(output).unlink()
        data = [f"a={texts}", f"b={texts}"]
        self.refused("the exemplars of p.safetensors belong there", str(llama), data, output, Settings(top=2))

    def test_nothing_is_written_if_a_later_source_is_bad(self, llama, texts, tmp_path):
        output = tmp_path / "p.safetensors"
        self.refused("no column 'none'", str(llama), [f"a={texts}", f"b={texts}:none"], output)
        assert not output.exists() and not exemplars_path(output).exists()

    def test_rows_that_are_all_empty(self, llama, tmp_path):
        data = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "  "}])
        self.refused("data source 'a' .*all its rows are empty", str(llama), [f"a={data}"], tmp_path / "p.safetensors")

    def test_a_column_that_is_no_text(self, llama, tmp_path):
        data = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": 1.5}])
        message = "column 'text' of row 0 holds float, needed is text"
        self.refused(message, str(llama), [f"a={data}"], tmp_path / "p.safetensors")

    def test_text_to_text_without_targets(self, texts, tmp_path):
        model = tiny.save_model("t5", tmp_path / "t5")
        message = "reads 2 columns .input and target., found input"
        self.refused(message, str(model), [f"a={texts}:input"], tmp_path / "p.safetensors")

    def test_gradients_without_labels(self, tmp_path):
        model = tiny.save_model("vit", tmp_path / "vit")
        data = f"a={tiny.write_images(tmp_path / 'images', 1)}:image"
        output = tmp_path / "p.safetensors"
        self.refused("the loss needs 2 columns", str(model), [data], output, Settings(gradients=True))
        measure_profile(str(model), [data], output)
        assert NeuronProfile.load(output).info.sources["a"].samples == 3

    def test_an_image_that_is_none(self, tmp_path):
        model = tiny.save_model("vit", tmp_path / "vit")
        images = tiny.write_images(tmp_path / "images", 1)
        (images / "dog" / "0.png").write_bytes(b"nonsense")
        message = "image dog/0.png of row .: cannot be read as an image"
        self.refused(message, str(model), [f"a={images}"], tmp_path / "p.safetensors")

    def test_a_label_that_the_model_does_not_have(self, tmp_path):
        model = tiny.save_model("vit", tmp_path / "vit")
        images = tiny.write_images(tmp_path / "images", 1)
        (images / "dog").rename(images / "wolf")
        message = "needed is one of the model's 3 labels, not 'wolf'"
        self.refused(message, str(model), [f"a={images}"], tmp_path / "p.safetensors")
