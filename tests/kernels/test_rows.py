"""Which rows of a tensor are neurons, and the blocks they are worked on in."""

from __future__ import annotations

import pytest
import torch

from neuron_methods.kernels.rows import CACHE_BYTES, neuron_rows, row_blocks


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_a_matrix_is_its_rows() -> None:
    matrix = numbered(3, 4)
    assert neuron_rows(matrix).tolist() == matrix.tolist()


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3, 5), (4, 3, 2, 2, 2)])
def test_a_convolution_is_flattened_to_output_channels(shape: tuple[int, ...]) -> None:
    kernel = numbered(*shape)
    assert neuron_rows(kernel).tolist() == [channel.flatten().tolist() for channel in kernel]


def test_a_convolution_with_one_output_channel_is_one_neuron() -> None:
    assert neuron_rows(numbered(1, 3, 2, 2)).shape == (1, 12)


def test_a_table_of_positions_is_its_positions() -> None:
    table = numbered(1, 5, 4)
    assert neuron_rows(table).tolist() == table[0].tolist()
    assert neuron_rows(numbered(1, 1, 4)).shape == (1, 4)


def test_a_matrix_with_one_row_stays_one_neuron() -> None:
    assert neuron_rows(numbered(1, 4)).shape == (1, 4)


def test_packed_matrices_are_the_rows_of_all() -> None:
    packed = numbered(2, 3, 4)
    rows = neuron_rows(packed, packed=True)
    assert rows.tolist() == [*packed[0].tolist(), *packed[1].tolist()]
    assert neuron_rows(numbered(1, 3, 4), packed=True).shape == (3, 4)
    assert neuron_rows(numbered(3, 4), packed=True).shape == (3, 4)


@pytest.mark.parametrize(
    ("shape", "packed", "expected"),
    [
        ((0, 4), False, (0, 4)),
        ((4, 0), False, (4, 0)),
        ((0, 3, 2), False, (0, 6)),
        ((0, 3, 2, 2), False, (0, 12)),
        ((1, 0, 4), False, (0, 4)),
        ((2, 0, 4), True, (0, 4)),
        ((2, 3, 0), True, (6, 0)),
    ],
)
def test_tensors_without_entries(shape: tuple[int, ...], packed: bool, expected: tuple[int, int]) -> None:
    assert neuron_rows(torch.empty(shape), packed=packed).shape == expected


@pytest.mark.parametrize("shape", [(3, 4), (4, 3, 2, 2), (1, 5, 4)])
def test_rows_of_a_contiguous_tensor_are_a_view_to_write_to(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    neuron_rows(tensor)[0].fill_(1.0)
    assert tensor.sum() == neuron_rows(tensor).shape[1]


def covered(neurons: int, bytes_per_neuron: int, scratch_bytes: int) -> list[int]:
    blocks = list(row_blocks(neurons, bytes_per_neuron, scratch_bytes))
    assert [row for block in blocks for row in range(neurons)[block]] == list(range(neurons))
    return [block.stop - block.start for block in blocks]


def test_blocks_cover_every_row_once_within_the_bound() -> None:
    assert covered(10, 4, 12) == [3, 3, 3, 1]
    assert covered(10, 4, 40) == [10]
    assert covered(9, 3, 9) == [3, 3, 3]


def test_a_row_larger_than_the_bound_is_a_block_of_its_own() -> None:
    assert covered(3, 100, 10) == [1, 1, 1]
    assert covered(3, 100, 0) == [1, 1, 1]


def test_no_rows_no_blocks() -> None:
    assert covered(0, 4, 12) == []


def test_rows_without_bytes_fit_into_one_block() -> None:
    assert covered(5, 0, 12) == [5]


def test_blocks_stay_in_cache_however_much_scratch_is_allowed() -> None:
    assert max(covered(100, CACHE_BYTES // 10, 1 << 60)) == 10
