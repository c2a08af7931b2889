"""Neuronal subspaces: the split and the merge of the orthogonal parts, by hand and against the oracle."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_methods.kernels import subspace
from neuron_methods.kernels.subspace import gram_matrices, merge_coefficients, singular_vectors, split_gram
from tests import oracle

Row = list[float]


def stack(base: Tensor, updates: Tensor) -> Tensor:
    """(neurons, d) and (neurons, experts, d) as `merge_coefficients` takes them."""
    return torch.cat([updates, base.unsqueeze(1)], dim=1).float()


def orthogonal_merge(base: Tensor, updates: Tensor, **options: object) -> Tensor:
    """ψ_⊥ in float64, shape (neurons, d)."""
    solved = merge_coefficients(stack(base, updates), **options)
    of_updates = torch.einsum("nt,ntd->nd", solved.orthogonal, updates.float().double())
    return of_updates - (solved.orthogonal * solved.parallel).sum(1, keepdim=True) * base.float().double()


def merged(updates: list[Row], base: Row | None = None, **options: object) -> Row:
    """ψ_⊥ of one neuron; the base row is zero unless given."""
    rows = torch.tensor([updates])
    return orthogonal_merge(torch.tensor([base or [0.0] * rows.shape[2]]), rows, **options)[0].tolist()


def close(expected: Row, tolerance: float = 1e-7) -> object:
    return pytest.approx(expected, abs=tolerance)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(*shape: int, density: float, seed: int = 0) -> Tensor:
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1000)) < density
    return random(*shape, seed=seed) * kept


def oracle_merge(base: Tensor, updates: Tensor, **options: object) -> Tensor:
    return oracle.merge_orthogonal(oracle.orthogonal_parts(updates.double(), base.double()), **options)


# Inner products and the split


@pytest.mark.parametrize("stacked", [1, 2, 4, 7, 8, 9, 12])
def test_gram_matrices_are_inner_products_in_float64(stacked: int) -> None:
    rows = random(5, stacked, 1000)
    expected = rows.double() @ rows.double().transpose(1, 2)
    gram = gram_matrices(rows)
    assert gram.dtype == torch.float64
    assert torch.allclose(gram, expected, rtol=1e-13, atol=1e-12)


def test_gram_matrices_do_not_round_as_float32_would() -> None:
    rows = torch.tensor([[[1.0, 2.0**-20, 1.0], [1.0, 2.0**-20, -1.0]]])
    assert gram_matrices(rows)[0, 0, 1].item() == 2.0**-40


@pytest.mark.parametrize("size", [1, 100, 8 * 4 * 32 * 3, 1 << 30])
def test_gram_matrices_do_not_depend_on_the_size_of_the_copies(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random(10, 4, 32)
    expected = gram_matrices(rows)
    monkeypatch.setattr(subspace, "WIDE_BYTES", size)
    assert torch.allclose(gram_matrices(rows), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_gram_matrices_of_nothing_are_zero(shape: tuple[int, ...]) -> None:
    assert gram_matrices(torch.empty(shape)).tolist() == torch.zeros(shape[0], 3, 3).tolist()


def test_split_by_hand() -> None:
    # w = (2, 0): (3, 4) = 1.5 w + (0, 4), and (1, −1) = 0.5 w + (0, −1)
    coefficients, orthogonal = split_gram(gram_matrices(torch.tensor([[[3.0, 4.0], [1.0, -1.0], [2.0, 0.0]]])))
    assert coefficients.tolist() == [[1.5, 0.5]]
    assert orthogonal.tolist() == [[[16.0, -4.0], [-4.0, 1.0]]]


def test_a_zero_base_row_has_no_direction() -> None:
    coefficients, orthogonal = split_gram(gram_matrices(torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]])))
    assert coefficients.tolist() == [[0.0, 0.0]]
    assert orthogonal.tolist() == [[[25.0, 3.0], [3.0, 1.0]]]


def test_an_update_along_the_base_row_has_no_orthogonal_part() -> None:
    w = random(7, 300)
    updates = torch.stack([0.37 * w, random(7, 300, seed=1)], dim=1)
    coefficients, orthogonal = split_gram(gram_matrices(stack(w, updates)))
    assert torch.allclose(coefficients[:, 0], torch.full((7,), 0.37, dtype=torch.float64), atol=1e-6)
    # 0.37 w is rounded to float32 entry by entry, and that much of it is orthogonal.
    assert (orthogonal[:, 0, 0] < 1e-13 * w.square().sum(1)).all()
    exact = torch.stack([0.5 * w, random(7, 300, seed=1)], dim=1)
    assert split_gram(gram_matrices(stack(w, exact)))[1][:, 0].abs().max() == 0
    assert split_gram(gram_matrices(stack(w, exact)))[1][:, :, 0].abs().max() == 0


def test_what_rounding_leaves_of_inner_products_is_zero() -> None:
    """Equally strong orthogonal experts: left in, 1e-15 would turn their singular vectors by 45 degrees."""
    gram = torch.tensor([[[4.0, 1e-15, 0.0], [1e-15, 4.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    assert split_gram(gram)[1].tolist() == [[[4.0, 0.0], [0.0, 4.0]]]
    small = torch.tensor([[[4.0, 1e-10, 0.0], [1e-10, 4.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    assert split_gram(small)[1].tolist() == [[[4.0, 1e-10], [1e-10, 4.0]]]


def test_energies_add_up_to_those_of_the_updates() -> None:
    w, updates = random(6, 50), random(6, 3, 50, seed=1)
    updates[2, 1] = 2 * w[2]
    solved = merge_coefficients(stack(w, updates))
    parallel = sum(
        float((oracle.split(tau, row)[0] * row).square().sum())
        for taus, row in zip(updates.double(), w.double(), strict=True)
        for tau in taus
    )
    assert solved.parallel_energy == pytest.approx(parallel)
    assert solved.parallel_energy + solved.orthogonal_energy == pytest.approx(float(updates.double().square().sum()))


@pytest.mark.parametrize("scale", [1e-22, 1e-15, 1e15])
def test_the_scale_of_the_base_row_does_not_matter(scale: float) -> None:
    """Rows of unused tokens hold numbers whose squares float32 cannot hold."""
    w, updates = random(20, 40), random(20, 3, 40, seed=1)
    assert torch.allclose(orthogonal_merge(w * scale, updates), orthogonal_merge(w, updates), atol=1e-5)


@pytest.mark.parametrize("tiny", [1e-31, 1e-38, 1e-45])
def test_coefficients_of_vanishing_base_rows_stay_finite(tiny: float) -> None:
    solved = merge_coefficients(torch.tensor([[[1.0, 2.0], [tiny, tiny]]]))
    assert solved.parallel.tolist() == [[0.0]]
    assert solved.orthogonal.tolist() == [[1.0]]


# The merge of the orthogonal parts, by hand


def test_one_expert_is_its_own_merge() -> None:
    assert merged([[3.0, 4.0, -1.0]]) == close([3.0, 4.0, -1.0])
    assert merged([[3.0, 4.0, -1.0]], base=[1.0, 0.0, 0.0]) == close([0.0, 4.0, -1.0])


def test_disjoint_experts_are_added_and_not_averaged() -> None:
    assert merged([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]) == close([3.0, 2.0, 0.0])
    assert merged([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]], base=[0.0, 0.0, 5.0]) == close([3.0, 2.0, 0.0])


def test_disjoint_experts_of_equal_strength_are_added() -> None:
    assert merged([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -2.0]]) == close([2.0, 2.0, -2.0])


def test_orthogonal_experts_of_equal_strength_are_added_whatever_the_base() -> None:
    # The orthogonal parts' inner product is zero but for rounding, and any rotation of their singular vectors would do
    # as well.
    w = torch.tensor([0.6875, 0.6875, 0.3125, 0.3125])
    across, other = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    for a in (0.5, 0.25, -0.75):
        for b in (0.125, 0.375, -1.5):
            updates = [(across + a * w).tolist(), (other + b * w).tolist()]
            assert merged(updates, base=w.tolist()) == close([2.0, -2.0, 0.0, 0.0])
            assert merged(updates[::-1], base=w.tolist()) == close([2.0, -2.0, 0.0, 0.0])


def test_experts_that_agree_exactly_are_kept_as_they_are() -> None:
    assert merged([[3.0, 4.0, 0.0]] * 2) == close([3.0, 4.0, 0.0])
    assert merged([[3.0, 4.0, 1.0]] * 5, base=[0.0, 0.0, 2.0]) == close([3.0, 4.0, 0.0])


def test_experts_that_agree_beside_a_third() -> None:
    # directions (1, 0) with scores 2, 2, 0 and (0, 1) with 0, 0, 1
    assert merged([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]) == close([2.0, 1.0])


def test_experts_along_one_line_are_averaged() -> None:
    assert merged([[3.0, 4.0], [9.0, 12.0]]) == close([6.0, 8.0])
    assert merged([[3.0, 4.0], [9.0, 12.0]], consensus="sum") == close([12.0, 16.0])


def test_the_stronger_of_two_opposite_experts_wins() -> None:
    assert merged([[4.0, 0.0], [-1.0, 0.0]]) == close([4.0, 0.0])
    assert merged([[4.0, 0.0], [-1.0, 0.0]], consensus="sum") == close([4.0, 0.0])
    assert merged([[1.0, 0.0], [-4.0, 0.0]]) == close([-4.0, 0.0])


@pytest.mark.parametrize("update", [[3.0, 4.0], [-3.0, -4.0], [0.1, 0.7], [1e-4, 3.3]])
def test_exactly_opposite_experts_do_not_depend_on_their_order(update: Row) -> None:
    opposite = [-value for value in update]
    # The only column ties, so its sign is negative: against the side that singular vectors are turned to.
    side = -1.0 if float(torch.tensor(update).double() @ oracle.sides(2)) > 0 else 1.0
    expected = [side * value for value in torch.tensor(update).tolist()]
    assert merged([update, opposite]) == close(expected)
    assert merged([opposite, update]) == close(expected)


def test_a_tied_direction_takes_the_majority_of_the_others() -> None:
    # (1, 1)/√2 scores 3/√2 twice; (1, −1)/√2 scores ±1/√2: a tie, resolved as the first direction's sign
    assert merged([[2.0, 1.0], [1.0, 2.0]]) == close([2.0, 1.0])
    assert merged([[1.0, 2.0], [2.0, 1.0]]) == close([2.0, 1.0])


def test_more_experts_than_inputs() -> None:
    updates = random(30, 5, 2, seed=1)
    assert torch.allclose(
        orthogonal_merge(torch.zeros(30, 2), updates), oracle_merge(torch.zeros(30, 2), updates), atol=1e-6
    )
    assert merged([[1.0], [2.0], [-1.0]]) == close([1.5])


def test_one_input_leaves_no_orthogonal_part() -> None:
    assert merged([[1.0], [2.0]], base=[0.3]) == [0.0]
    assert torch.equal(orthogonal_merge(random(50, 1), random(50, 3, 1, seed=1)), torch.zeros(50, 1).double())


def test_no_update_no_merge() -> None:
    assert merged([[0.0, 0.0], [0.0, 0.0]], base=[1.0, 2.0]) == [0.0, 0.0]
    assert merged([[0.0, 0.0]]) == [0.0, 0.0]


@pytest.mark.parametrize("consensus", ["mean", "sum"])
def test_an_expert_that_keeps_nothing_in_a_neuron_does_not_count(consensus: str) -> None:
    w, updates = random(100, 20), random(100, 3, 20, seed=1)
    without = orthogonal_merge(w, updates, consensus=consensus)
    for place in range(4):
        absent = torch.cat([updates[:, :place], torch.zeros(100, 1, 20), updates[:, place:]], dim=1)
        assert torch.allclose(orthogonal_merge(w, absent, consensus=consensus), without, atol=1e-6)


def test_an_expert_whose_update_is_all_parallel_does_not_count() -> None:
    w, updates = random(100, 20), random(100, 2, 20, seed=1)
    parallel = torch.cat([updates, 0.25 * w.unsqueeze(1)], dim=1)
    assert torch.allclose(orthogonal_merge(w, parallel), orthogonal_merge(w, updates), atol=1e-6)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.1, [3.0, 0.0]), (0.69, [3.0, 0.0]), (0.7, [3.0, 2.0]), (1.0, [3.0, 2.0])]
)
def test_rank_energy_keeps_the_strongest_directions_that_hold_it(share: float, expected: Row) -> None:
    # energies 9 and 4: the first direction holds 9/13 = 0.692
    assert merged([[3.0, 0.0], [0.0, 2.0]], rank_energy=share) == close(expected)


def test_rank_energy_that_a_direction_holds_exactly_needs_no_other() -> None:
    # energies 9, 3 and 4 of 16
    updates = [[3.0, 0.0, 0.0], [0.0, 3.0**0.5, 0.0], [0.0, 0.0, 2.0]]
    assert merged(updates, rank_energy=9 / 16) == close([3.0, 0.0, 0.0])
    assert merged(updates, rank_energy=13 / 16) == close([3.0, 0.0, 2.0])


def test_rank_energy_counts_each_neuron_by_itself() -> None:
    updates = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.9]]])
    merge = orthogonal_merge(torch.zeros(2, 2), updates, rank_energy=0.6)
    assert torch.allclose(merge, torch.tensor([[3.0, 0.0], [1.0, 0.9]]).double())


def test_singular_vectors_come_strongest_first_and_orthonormal() -> None:
    updates = random(40, 4, 30, seed=1).double()
    gram = updates @ updates.transpose(1, 2)
    left = singular_vectors(gram, gram.diagonal(dim1=1, dim2=2))
    assert torch.allclose(left.transpose(1, 2) @ left, torch.eye(4).double(), atol=1e-12)
    squares = (left.transpose(1, 2) @ gram @ left).diagonal(dim1=1, dim2=2)
    expected = torch.linalg.svdvals(updates).square()
    assert torch.allclose(squares, expected, rtol=1e-10)


def test_scores_that_are_rounding_are_zero() -> None:
    """Left in, they would be counted in the average of whoever does score on the direction."""
    gram = torch.diag(torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64)).unsqueeze(0)
    gram[0, 0, 1] = gram[0, 1, 0] = 1e-13
    left = singular_vectors(gram, torch.tensor([[9.0, 4.0, 1.0]], dtype=torch.float64))
    assert left[0].abs().tolist() == torch.eye(3).tolist()
    gram[0, 0, 1] = gram[0, 1, 0] = 1e-9
    left = singular_vectors(gram, torch.tensor([[9.0, 4.0, 1.0]], dtype=torch.float64))
    assert left[0, 1, 0].abs().item() == pytest.approx(1e-9 / 5, rel=1e-3)


# Against the oracle


@pytest.mark.parametrize("consensus", ["mean", "sum"])
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("width", "density"), [(3, 1.0), (8, 1.0), (64, 0.1), (300, 0.02), (300, 1.0)])
def test_random_neurons_agree_with_the_oracle(experts: int, width: int, density: float, consensus: str) -> None:
    w, updates = random(60, width), sparse(60, experts, width, density=density, seed=experts)
    difference = orthogonal_merge(w, updates, consensus=consensus) - oracle_merge(w, updates, consensus=consensus)
    assert difference.abs().max() < 1e-6 * updates.abs().max()


@pytest.mark.parametrize("rank_energy", [0.3, 0.6, 0.9, 0.99])
def test_parts_of_the_spectrum_agree_with_the_oracle(rank_energy: float) -> None:
    w, updates = random(100, 40), random(100, 5, 40, seed=1)
    difference = orthogonal_merge(w, updates, rank_energy=rank_energy) - oracle_merge(
        w, updates, rank_energy=rank_energy
    )
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("factor", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("density", [1.0, 0.05])
def test_experts_of_very_different_strength_agree_with_the_oracle(factor: float, density: float) -> None:
    """A weak expert's direction is no rounding, and its score on a strong one counts."""
    w, updates = random(60, 200), sparse(60, 2, 200, density=density)
    updates[:, 1] *= factor
    difference = orthogonal_merge(w, updates) - oracle_merge(w, updates)
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4])
def test_updates_almost_along_the_base_row_agree_with_the_oracle(share: float) -> None:
    """What little is orthogonal of an update counts as long as it is more than rounding."""
    w, updates = random(60, 100), random(60, 3, 100, seed=1)
    updates[:, 0] = 0.5 * w + share * updates[:, 0]
    difference = orthogonal_merge(w, updates) - oracle_merge(w, updates)
    assert difference.abs().max() < 1e-6


def test_experts_that_overlap_only_through_the_base_row_agree_with_the_oracle() -> None:
    """Few kept entries each, at different places: their inner products are small and real."""
    w, updates = random(500, 400), torch.zeros(500, 3, 400)
    generator = torch.Generator().manual_seed(2)
    for neuron in range(500):
        places = torch.randperm(400, generator=generator)[:6]
        for expert in range(3):
            updates[neuron, expert, places[2 * expert : 2 * expert + 2]] = torch.randn(2, generator=generator)
    difference = orthogonal_merge(w, updates) - oracle_merge(w, updates)
    assert difference.abs().max() < 1e-6


INTEGERS = st.lists(st.integers(-3, 3), min_size=4, max_size=4)


@settings(max_examples=300, deadline=None)
@given(updates=st.lists(INTEGERS, min_size=2, max_size=2), base=INTEGERS)
def test_two_experts_can_change_places(updates: list[Row], base: Row) -> None:
    """Small integers tie, agree, oppose and vanish in every way there is."""
    updates = [[float(value) for value in update] for update in updates]
    w = [float(value) for value in base]
    assert merged(updates, base=w) == close(merged(updates[::-1], base=w), 1e-6)


@pytest.mark.parametrize("order", list(permutations(range(4)))[1:])
def test_experts_can_change_places(order: tuple[int, ...]) -> None:
    w, updates = random(50, 30), sparse(50, 4, 30, density=0.3, seed=1)
    assert torch.allclose(orthogonal_merge(w, updates[:, list(order)]), orthogonal_merge(w, updates), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([-1e3, -1.0, 1e-6, 2.0, 1e6]), experts=st.integers(1, 4))
def test_scaling_the_updates_scales_the_merge(seed: int, scale: float, experts: int) -> None:
    w, updates = random(8, 12, seed=seed), random(8, experts, 12, seed=seed + 1)
    expected = orthogonal_merge(w, updates) * scale
    assert torch.allclose(orthogonal_merge(w, updates * scale), expected, rtol=1e-4, atol=1e-5 * abs(scale))
