"""Adapters merged by response: through their factors, to what the formed experts give, and out again without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor

from neuron_methods.adapters.export import AdapterSummary
from neuron_methods.adapters.kept import Precision
from neuron_methods.cli import main
from neuron_methods.kernels import low_rank, response
from neuron_methods.kernels.task_vectors import LowRankTaskVector
from neuron_methods.methods.inputs_file import InputsInfo, save_inputs
from neuron_methods.plugin.adapter_output import AdapterOutput
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.support.errors import UserError
from tests.adapters import cases
from tests.adapters.cases import CASES, lora, save_base, tensors, train

UP = "model.layers.1.mlp.up_proj.weight"


def source(base: Path, *models: object, own: Any = None, **parameters: Any) -> str:
    listed = [{"model": str(m), "parameters": (own or {}).get(i, {})} for i, m in enumerate(models)]
    shared = {"ridge": 0.1, **parameters}  # automatically, adapters and what is formed of them have each their own
    content = {"merge_method": "neuron_response", "base_model": str(base), "models": listed, "parameters": shared}
    return yaml.safe_dump(content)


def in_full(text: str, out: Path) -> dict[str, Tensor]:
    merge_to_directory(text, out, progress=False)
    return tensors(out)


def as_adapter(text: str, out: Path, precision: Precision | None = None) -> AdapterSummary:
    return merge_to_directory(text, out, output=AdapterOutput(precision), progress=False).adapter


class Two:
    """A base, two adapters on it, and what peft makes of each."""

    def __init__(self, root: Path, case: str, other: Any = None) -> None:
        torch.manual_seed(len(case))
        self.base = save_base(CASES[case].model(), root / "base")
        configs = [CASES[case].config(), (other or CASES[case].config)()]
        self.adapters = [train(self.base, c, root / f"adapter-{i}", i) for i, c in enumerate(configs)]
        self.models = [f"{self.base}+{adapter}" for adapter in self.adapters]
        self.merged = [cases.merge(self.base, a, root / f"full-{i}") for i, a in enumerate(self.adapters)]


ALIKE = [
    "llama",
    "llama-patterns",
    "llama-rslora",
    "llama-dora",
    "llama-embeddings",
    "llama-tied-embedding",
    "llama-tied-embedding-saved",
    "llama-norms-saved",
    "llama-lora-bias",
    "llama-bias-all",
    "llama-tokens",
    "t5",
    "t5-gated",
    "vit",
    "vit-dora",
    "clip-vision",
    "clip",
    "gpt2",
    "gpt2-dora",
    "experts",
]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ALIKE)
def test_adapters_are_merged_like_what_peft_makes_of_them(case: str, tmp_path: Path) -> None:
    two = Two(tmp_path, case)
    for subspace in ("all", "orthogonal"):
        found = in_full(source(two.base, *two.models, subspace=subspace), tmp_path / f"direct-{subspace}")
        formed = in_full(source(two.base, *two.merged, subspace=subspace), tmp_path / f"formed-{subspace}")
        assert_close(found, formed)
    changed = [name for name, tensor in tensors(two.base).items() if not torch.equal(tensor, found[name])]
    assert changed


@pytest.mark.parametrize("case", ALIKE)
def test_an_adapter_comes_out_without_loss(case: str, tmp_path: Path) -> None:
    two = Two(tmp_path, case)
    text = source(two.base, *two.models)
    expected = in_full(text, tmp_path / "full")
    summary = as_adapter(text, tmp_path / "adapter")
    assert_close(tensors(cases.merge(two.base, tmp_path / "adapter", tmp_path / "again")), expected)
    assert not summary.warnings
    kinds = {kind.kind: kind for kind in summary.kinds}
    if "dora" not in case and case not in ("experts", "llama-embeddings", "t5-gated"):
        asked = {
            "llama-patterns": {"q_proj": (4, 4), "up_proj": (6, 8), "v_proj": (8, 8)},
            "llama-rslora": {"q_proj": (4, 4)},
        }.get(case, {})
        for kind, (low, high) in asked.items():
            assert (min(kinds[kind].ranks), max(kinds[kind].ranks)) == (low, high)
        factored = [kind for kind in kinds.values() if kind.answered]
        assert factored
        for kind in factored:
            assert kind.answered == [1.0] * len(kind.ranks)
            assert kind.energy_kept == pytest.approx(1.0, abs=1e-9)
            assert kind.kind in asked or set(kind.ranks) == {8}  # 4 + 4


@pytest.mark.parametrize("inputs", ["update", "profile"])
def test_adapters_on_different_modules(inputs: str, tmp_path: Path) -> None:
    """One that leaves a module alone says by measured inputs that they want no answer; by itself it says nothing."""
    two = Two(tmp_path, "llama-rslora", lora(target_modules=["q_proj", "up_proj"]))  # beside q and v
    own = {}
    if inputs == "profile":
        for i in range(2):
            factors = {"0": torch.randn(9, 16, generator=torch.Generator().manual_seed(i)), "1": torch.randn(9, 24)}
            modules = {
                f"model.layers.{layer}.{module}": "1" if "down" in module else "0"
                for layer in range(2)
                for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
            }
            info = InputsInfo(model="x", model_type="llama", modules=modules, tokens={"0": 9, "1": 9})
            save_inputs(tmp_path / f"{i}.safetensors", info, factors)
            own[i] = {"inputs": "profile", "profile": str(tmp_path / f"{i}.safetensors")}
    direct = source(two.base, *two.models, own=own)
    found = in_full(direct, tmp_path / "direct")
    base = tensors(two.base)
    if inputs == "update":
        one = in_full(source(two.base, two.models[1]), tmp_path / "one")
        torch.testing.assert_close(found[UP], one[UP], atol=1e-5, rtol=1e-5)
    else:
        assert_close(found, in_full(source(two.base, *two.merged, own=own), tmp_path / "formed"))
        alone = in_full(source(two.base, two.models[1], own={0: own[1]}), tmp_path / "one")
        assert not torch.allclose(found[UP], alone[UP], atol=1e-3)
    assert not torch.equal(found[UP], base[UP])
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[down], base[down])
    summary = as_adapter(direct, tmp_path / "adapter")
    assert_close(tensors(cases.merge(two.base, tmp_path / "adapter", tmp_path / "again")), found)
    ranks = {kind.kind: set(kind.ranks) for kind in summary.kinds}
    assert ranks["up_proj"] == {4}


def test_gpt2_adapters_on_different_modules(tmp_path: Path) -> None:
    """Whose weights are stored inputs first."""
    torch.manual_seed(0)
    base = save_base(cases.gpt2(), tmp_path / "base")
    names = ["c_attn", "c_fc"]
    adapters = [train(base, lora(target_modules=[n])(), tmp_path / n, i) for i, n in enumerate(names)]
    found = in_full(source(base, *(f"{base}+{a}" for a in adapters)), tmp_path / "direct")
    formed = [cases.merge(base, a, tmp_path / f"full-{i}") for i, a in enumerate(adapters)]
    assert_close(found, in_full(source(base, *formed), tmp_path / "formed"))


@pytest.mark.parametrize("case", ["llama", "gpt2", "vit", "llama-dora", "experts"])
@pytest.mark.parametrize("subspace", ["all", "orthogonal"])
def test_adapters_and_full_experts_go_together(case: str, subspace: str, tmp_path: Path) -> None:
    two = Two(tmp_path, case)
    found = in_full(source(two.base, two.models[0], two.merged[1], subspace=subspace), tmp_path / "mixed")
    assert_close(found, in_full(source(two.base, *two.merged, subspace=subspace), tmp_path / "formed"))


def test_lora_and_dora_go_together(tmp_path: Path) -> None:
    two = Two(tmp_path, "llama", CASES["llama-dora"].config)
    found = in_full(source(two.base, *two.models), tmp_path / "mixed")
    assert_close(found, in_full(source(two.base, *two.merged), tmp_path / "formed"))


def test_no_update_of_an_adapter_is_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Two(tmp_path, "llama")

    def never(*_args: object) -> Tensor:
        raise AssertionError("formed")

    monkeypatch.setattr(LowRankTaskVector, "dense", never)
    monkeypatch.setattr(low_rank.LowRank, "dense", never)
    monkeypatch.setattr(response, "_many", never)
    in_full(source(two.base, *two.models), tmp_path / "direct")


def test_a_lower_rank_is_the_best_in_what_it_answers_and_is_told(tmp_path: Path) -> None:
    two = Two(tmp_path, "llama")
    text = source(two.base, *two.models)
    merged, base = in_full(text, tmp_path / "full"), tensors(two.base)
    summary = as_adapter(text, tmp_path / "adapter", Precision(rank=3))
    again = tensors(cases.merge(two.base, tmp_path / "adapter", tmp_path / "again"))
    experts = [tensors(path) for path in two.merged]
    answered, energies, missed = [], 0.0, 0.0
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        updates = [(e[name] - base[name]).double() for e in experts]
        s = sum(u.T @ u / u.square().sum() for u in updates) / 2
        values, vectors = torch.linalg.eigh(s)
        root = vectors * values.clamp(min=0).sqrt()
        update = (merged[name] - base[name]).double()
        squares = torch.linalg.svdvals(update @ root).square()
        lost = ((again[name] - merged[name]).double() @ root).square().sum()
        assert float(lost / squares.sum()) == pytest.approx(float(squares[3:].sum() / squares.sum()), rel=1e-3)
        answered.append(float(squares[:3].sum() / squares.sum()))
        energies += float(update.square().sum())
        missed += float((again[name] - merged[name]).double().square().sum())
    (kind,) = [kind for kind in summary.kinds if kind.kind == "up_proj"]
    assert kind.ranks == [3, 3]
    assert kind.answered == pytest.approx(answered, abs=1e-5)
    assert kind.energy_kept == pytest.approx(1 - missed / energies, abs=1e-4)
    told = f"up_proj: 2 matrices, rank 3, {50 * sum(answered):.2f} % of the responses' energy, "
    assert str(kind).startswith(told)
    assert f"{100 * (1 - missed / energies):.2f} % of the energy, error norm" in str(kind)


def test_energy_is_that_of_the_responses(tmp_path: Path) -> None:
    two = Two(tmp_path, "llama")
    summary = as_adapter(source(two.base, *two.models), tmp_path / "adapter", Precision(None, 0.8))
    for kind in summary.kinds:
        assert all(share >= 0.8 for share in kind.answered)
        assert max(kind.ranks) < 8
    assert any(
        f"{kind.kind} {100 * kind.answers_kept:.1f} % of what is answered" in summary.warnings[0]
        for kind in summary.kinds
        if kind.answers_kept < 0.9
    )


def test_no_rank_of_64_is_asked_for_unasked(tmp_path: Path) -> None:
    """Adapters of rank 40 each, on layers of 200: their 80 directions all go into the adapter."""
    wide = {"hidden_size": 96, "intermediate_size": 200}
    torch.manual_seed(0)
    base = save_base(cases.llama(**wide), tmp_path / "base")
    paths = [train(base, lora(r=40, target_modules=["up_proj"])(), tmp_path / str(i), i, 0.02) for i in range(2)]
    (tmp_path / "merge.yaml").write_text(source(base, *(f"{base}+{path}" for path in paths)))
    arguments = ["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out"), "--as-adapter"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "up_proj: 2 matrices, rank 80, 100.00 % of the responses' energy, 100.00 % of the energy" in done.stdout
    assert "response kept: " in done.stdout
    done = CliRunner().invoke(main, [*arguments, "--rank", "64", "--force"])
    assert "up_proj: 2 matrices, rank 64, " in done.stdout, done.output


def test_an_adapter_for_a_narrow_dtype(tmp_path: Path) -> None:
    """Both factors are of one size, so that neither loses in a dtype whose range is small."""
    two = Two(tmp_path, "llama")
    text = source(two.base, *two.models)
    merged = in_full(text, tmp_path / "full")
    base = tensors(two.base)
    for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        for rank in (None, 7):
            as_adapter(text, tmp_path / f"{dtype}-{rank}", Precision(rank, None, dtype))
            path = tmp_path / f"{dtype}-{rank}-merged"
            again = tensors(cases.merge(two.base, tmp_path / f"{dtype}-{rank}", path))
            if rank is None:
                update = merged[UP] - base[UP]
                assert float((again[UP] - merged[UP]).norm() / update.norm()) < tolerance


# -------------------------------------------------------------------------------------------------- bad input


def test_a_profile_of_other_modules_than_the_adapter_touches(tmp_path: Path) -> None:
    two = Two(tmp_path, "llama-rslora")
    modules = {f"model.layers.{layer}.self_attn.q_proj": "0" for layer in range(2)}
    path = str(tmp_path / "p.safetensors")
    save_inputs(path, InputsInfo(model="x", model_type="llama", modules=modules, tokens={}), {"0": torch.randn(5, 16)})
    text = source(two.base, *two.models, own={0: {"inputs": "profile", "profile": path}})
    with pytest.raises(UserError) as error:
        merge_to_directory(text, tmp_path / "out", progress=False)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("model.layers.0.self_attn.v_proj.weight: ")
    assert f"changes it, and profile {path} has no inputs of model.layers.0.self_attn.v_proj; measure" in line
    assert not (tmp_path / "out").exists()


def test_factors_that_are_not_finite(tmp_path: Path) -> None:
    two = Two(tmp_path, "llama-rslora")
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

    def spoil(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        stored[key][2, 1] = float("nan")
        return stored

    cases.rewrite(two.adapters[1], spoil)
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight.*NaN or Inf") as error:
        merge_to_directory(source(two.base, *two.models), tmp_path / "out", progress=False)
    assert "adapter-1" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
