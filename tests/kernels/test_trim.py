"""The streaming threshold against sorting, and what trimming keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_methods.kernels import trim
from neuron_methods.kernels.devices import Crew
from neuron_methods.kernels.differing import keep_differing_, largest_left_out, variances
from neuron_methods.kernels.task_vectors import TaskVector
from neuron_methods.kernels.trim import (
    BINS,
    Bracket,
    ThresholdSearch,
    count_task_vectors,
    kept_rank,
    trim_,
)

ENTRIES = 20_000
DENSITIES = [1.0, 0.9, 0.5, 0.15, 0.1, 0.01, 1e-4, 1e-9]


def search(
    stream: Tensor, density: float, *, chunk: int = 4096, sample: Sequence[Tensor] | None = None
) -> ThresholdSearch:
    """Run a search to its end; the sample is the whole stream unless one is given."""
    found = ThresholdSearch(density)
    found.bracket_from_sample([torch.atleast_2d(run) for run in ([stream.abs()] if sample is None else sample)])
    while True:
        for part in stream.split(chunk):
            found.count(part.clone())
        if found.finish():
            return found


def check(stream: Tensor, density: float, found: ThresholdSearch) -> None:
    """Threshold, kept entries and σ against the definition, by sorting in full."""
    rank = int(len(stream) * (1 - density))
    magnitudes = stream.abs()
    expected = float(magnitudes.kthvalue(rank).values) if rank else 0.0
    assert found.threshold == expected
    assert found.entries == len(stream)
    exact = magnitudes.double()
    total, removed = float(exact.sum()), float(exact[exact < expected].sum())
    assert found.total_l1 == pytest.approx(total, rel=1e-5)
    assert found.sigma == pytest.approx(removed / total if total else 0.0, abs=2e-6)
    assert 0.0 <= found.sigma < 1.0


def normal(seed: int = 0, entries: int = ENTRIES) -> Tensor:
    return torch.randn(entries, generator=torch.Generator().manual_seed(seed))


def bfloat16_differences(entries: int = ENTRIES) -> Tensor:
    """A fine-tuned bf16 model's: few distinct values, thousands of entries each."""
    base = normal(1, entries) * 0.02
    return (base + normal(2, entries) * 1e-4).bfloat16().float() - base.bfloat16().float()


def mostly_zero(entries: int = ENTRIES) -> Tensor:
    return normal(0, entries) * (torch.rand(entries, generator=torch.Generator().manual_seed(3)) < 0.1)


def heterogeneous() -> Tensor:
    return torch.cat([normal(seed, ENTRIES // 5) * 10.0 ** (2 * seed - 6) for seed in range(5)])


def wide_range() -> Tensor:
    """Every exponent that float32 has, denormals among them."""
    bits = torch.randint(0, 0x7F800000, (ENTRIES,), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    return bits.view(torch.float32) * 1e-6


STREAMS: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "bfloat16 differences": bfloat16_differences,
    "nine tenths zero": mostly_zero,
    "heterogeneous": heterogeneous,
    "wide range": wide_range,
    "all equal": lambda: torch.full((ENTRIES,), -0.125),
    "all zero": lambda: torch.zeros(ENTRIES),
    "two values": lambda: torch.tensor([1.0, -2.0]).repeat(ENTRIES // 2),
    "denormal": lambda: normal() * 1e-41,
    "huge": lambda: normal() * 1e37,
    "three": lambda: torch.tensor([3.0, -1.0, 2.0]),
    "one": lambda: torch.tensor([-5.0]),
    "one zero": lambda: torch.tensor([0.0]),
}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", STREAMS)
def test_the_threshold_is_the_exact_order_statistic(name: str, density: float) -> None:
    stream = STREAMS[name]()
    check(stream, density, search(stream, density))


@pytest.mark.parametrize("name", STREAMS)
def test_no_sample_is_needed(name: str) -> None:
    stream = STREAMS[name]()
    found = search(stream, 0.15, sample=[])
    check(stream, 0.15, found)
    assert found.passes <= 2


@pytest.mark.parametrize("chunk", [1, 7, 1000, ENTRIES, 10 * ENTRIES])
def test_chunking_does_not_matter(chunk: int) -> None:
    stream = bfloat16_differences()[: 3000 if chunk == 1 else ENTRIES]
    check(stream, 0.15, search(stream, 0.15, chunk=chunk))


def runs_of(stream: Tensor) -> list[Tensor]:
    """A sample of a sixteenth of the stream, as a search is offered it."""
    return [stream.reshape(-1, 1000)[:, :64].abs()]


def one_scale_per_tensor() -> Tensor:
    """Float32 updates of forty tensors, the largest some two times the smallest."""
    scales = 1 + torch.rand(40, generator=torch.Generator().manual_seed(5))
    return normal(6, 1_600_000) * 1e-4 * scales.repeat_interleave(40_000)


ORDINARY: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(0, 1_600_000),
    "bfloat16 differences": lambda: bfloat16_differences(1_600_000),
    "mostly zero": lambda: mostly_zero(1_600_000),
    "one scale per tensor": one_scale_per_tensor,
}


@pytest.mark.parametrize("density", [0.5, 0.15, 0.02])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_data_takes_one_pass(name: str, density: float) -> None:
    stream = ORDINARY[name]()
    found = search(stream, density, sample=runs_of(stream), chunk=100_000)
    check(stream, density, found)
    assert found.passes == 1


def test_few_significant_bits_take_one_pass_however_wide_the_bracket() -> None:
    stream = bfloat16_differences()
    found = search(stream, 0.15, sample=[])
    check(stream, 0.15, found)
    assert found.passes == 1


def test_a_wide_bin_of_one_pattern_is_exact_beside_bins_of_many() -> None:
    # 4000 entries of 2⁻⁷ at the threshold; whatever lies below and above has all the bits of float32.
    uniform = torch.rand(9000, generator=torch.Generator().manual_seed(1))
    below, above = 2.0**-8 * (1 + 0.9 * uniform[:8000]), 2.0**-6 * (1 + uniform[8000:])
    stream = torch.cat([below, torch.full((4000,), 2.0**-7), above])
    found = search(stream, 0.2, sample=[])
    check(stream, 0.2, found)
    assert found.threshold == 2.0**-7
    assert found.sigma > 0.4
    assert found.passes == 1


def test_a_wide_bin_of_many_patterns_is_looked_at_again() -> None:
    step = 2.0**-30
    stream = 2.0**-7 + step * torch.arange(1000).remainder(7)
    assert stream.unique().numel() == 7
    found = search(stream, 0.15, sample=[])
    check(stream, 0.15, found)
    assert found.passes == 2


MISLEADING: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "far too small": lambda stream: [stream.abs()[:500] * 1e-6],
    "far too large": lambda stream: [stream.abs()[:500] * 1e6],
    "a little too small": lambda stream: [stream.abs() * 0.9],
    "a little too large": lambda stream: [stream.abs() * 1.1],
    "all zero": lambda stream: [torch.zeros(500)],
    "one value": lambda stream: [torch.ones(1)],
    "a single value many times": lambda stream: [torch.full((500,), 0.3)],
    "the largest float32": lambda stream: [torch.full((9,), torch.finfo(torch.float32).max)],
    "the smallest float32": lambda stream: [torch.full((9,), 1e-45)],
}


@pytest.mark.parametrize("density", [0.9, 0.15, 1e-4])
@pytest.mark.parametrize("name", MISLEADING)
def test_a_misleading_sample_costs_passes_and_no_exactness(name: str, density: float) -> None:
    for stream in (normal(), bfloat16_differences(), wide_range()):
        found = search(stream, density, sample=MISLEADING[name](stream))
        check(stream, density, found)
        assert found.passes <= 3


def test_a_missed_threshold_does_take_another_pass() -> None:
    assert search(normal(), 0.15, sample=MISLEADING["far too small"](normal())).passes > 1
    assert search(normal(), 0.15, sample=MISLEADING["far too large"](normal())).passes > 1


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    sample=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=10),
    density=st.floats(1e-6, 1.0),
    chunk=st.integers(1, 70),
)
def test_any_stream_any_sample_any_density(
    values: list[float], sample: list[float], density: float, chunk: int
) -> None:
    stream = torch.tensor(values)
    runs = [torch.tensor(sample).abs()] if sample else []
    found = search(stream, density, chunk=chunk, sample=runs)
    check(stream, density, found)


def test_the_published_rank() -> None:
    assert kept_rank(100, 1.0) == 0
    assert kept_rank(100, 0.15) == 85
    assert kept_rank(7, 0.15) == 5  # 5.95
    # 1 − 0.9 is a little less than 0.1 in floating point, and the published code floors it as it stands.
    assert kept_rank(10, 0.9) == 0
    assert kept_rank(10, 1e-12) == 9


def test_hand_computed_threshold_and_sigma() -> None:
    stream = torch.tensor([1.0, -4.0, 2.0, 8.0, -16.0, 3.0, 0.5, -0.25, 0.0, 5.0])
    # sorted: 0 .25 .5 1 2 3 4 5 8 16; density 0.3: rank 7, threshold 4; removed 6.75 of 39.75
    found = search(stream, 0.3)
    assert found.threshold == 4.0
    assert found.sigma == pytest.approx(6.75 / 39.75, rel=1e-6)
    assert trim_(stream.clone(), 4.0).tolist() == [0, -4, 0, 8, -16, 0, 0, 0, 0, 5]


def test_every_entry_at_the_threshold_is_kept() -> None:
    stream = torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0, 3.0, 1.0, 1.0])
    found = search(stream, 0.25)  # rank 6 of 1 1 1 2 2 2 2 3
    assert found.threshold == 2.0
    assert int((trim_(stream.clone(), 2.0) != 0).sum()) == 5
    assert found.sigma == pytest.approx(3 / 14, rel=1e-6)


def test_density_one_removes_nothing() -> None:
    found = search(normal(), 1.0)
    assert (found.threshold, found.sigma) == (0.0, 0.0)


def test_an_empty_stream() -> None:
    found = ThresholdSearch(0.15)
    found.bracket_from_sample([])
    assert found.finish()
    assert (found.threshold, found.sigma, found.entries) == (0.0, 0.0, 0)
    found = ThresholdSearch(0.15)
    found.count(torch.empty(0))
    assert found.finish()
    assert (found.threshold, found.sigma) == (0.0, 0.0)


@pytest.mark.parametrize("density", [0.5, 0.15, 0.04, 0.01])
@pytest.mark.parametrize("sampled", [True, False])
def test_zeros_can_be_counted_without_a_chunk(density: float, sampled: bool) -> None:
    stream = normal(0, 5000)
    whole = torch.cat([torch.zeros(70_000), stream, torch.zeros(25_000)])
    found = ThresholdSearch(density)
    found.bracket_from_sample([whole[::10].abs().reshape(-1, 100)] if sampled else [])
    for _ in range(4):
        found.count_zeros(70_000)
        found.count(stream.clone())
        found.count_zeros(25_000)
        if found.finish():
            break
    check(whole, density, found)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("density", [0.15, 1e-9])
def test_nonfinite_entries_show_in_the_total(value: float, sampled: bool, density: float) -> None:
    stream = normal(0, 3000)
    stream[1234] = value
    found = ThresholdSearch(density)
    found.bracket_from_sample([(stream if sampled else stream[:1000]).abs().reshape(-1, 100)])
    found.count(stream.clone())
    assert not math.isfinite(found.total_l1)


def test_large_entries_do_not_pass_for_infinite_ones() -> None:
    stream = torch.full((1000,), 3e38)
    check(stream, 0.15, search(stream, 0.15))


def test_trim_keeps_magnitudes_at_the_threshold_and_above() -> None:
    below = torch.nextafter(torch.tensor(0.3), torch.tensor(0.0)).item()
    above = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)).item()
    exact = torch.tensor(0.3).item()
    values = torch.tensor([below, exact, above, -below, -exact, -above, 0.0, -0.0])
    assert trim_(values, exact).tolist() == [0.0, exact, above, 0.0, -exact, -above, 0.0, 0.0]


def test_trim_works_in_place_on_strided_rows() -> None:
    stack = torch.tensor([[[1.0, 5.0], [2.0, -3.0]], [[-7.0, 0.5], [4.0, 1.0]]])
    row = stack[:, 1]
    assert trim_(row, 2.0).data_ptr() == row.data_ptr()
    assert stack.tolist() == [[[1.0, 5.0], [2.0, -3.0]], [[-7.0, 0.5], [4.0, 0.0]]]


def test_trim_at_zero_and_at_the_smallest_float32() -> None:
    smallest = 1e-45
    values = torch.tensor([0.0, smallest, -smallest, 1.0])
    assert trim_(values.clone(), 0.0).tolist() == values.tolist()
    assert trim_(values.clone(), smallest).tolist() == values.tolist()
    assert trim_(values.clone(), 1e-44).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_trim_lets_nan_through_to_whoever_checks() -> None:
    assert trim_(torch.tensor([math.nan, 0.1, 2.0]), 1.0).isnan().tolist() == [True, False, False]


class Seen(ThresholdSearch):
    """Keeps the chunks that it is given."""

    def tally(self, chunk: Tensor) -> Tensor:
        return chunk.clone()

    def add(self, found: Tensor) -> None:
        self.chunks = [*getattr(self, "chunks", []), found]


def seen(base: Tensor, *experts: Tensor) -> list[list[Tensor]]:
    searches = [Seen(1.0) for _ in experts]
    count_task_vectors(base, experts, searches, Crew())
    return [getattr(search, "chunks", []) for search in searches]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (16,), (17,), (4, 4, 3), (0, 4)])
def test_chunks_are_the_task_vectors_in_float32(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim, "CHUNK", 16)
    base, *experts = (normal(seed, 100)[: math.prod(shape)].reshape(shape).to(dtype) for seed in range(3))
    experts[1] = experts[1].float()  # experts may come in different dtypes
    for expert, chunks in zip(experts, seen(base, *experts), strict=True):
        assert all(chunk.dtype == torch.float32 and len(chunk) <= 16 for chunk in chunks)
        expected = (expert.float() - base.float()).flatten()
        assert torch.cat([torch.empty(0), *chunks]).tolist() == expected.tolist()


def test_chunks_take_task_vectors_as_they_are() -> None:
    base = torch.full((5,), 1000.0)
    update = torch.full((5,), 1e-6)
    ((chunk,),) = seen(base, update.as_subclass(TaskVector))
    assert chunk.tolist() == update.tolist()


def test_chunks_take_strided_tensors() -> None:
    base, expert = torch.zeros(3, 4).T, torch.arange(12.0).reshape(3, 4).T
    ((chunk,),) = seen(base, expert)
    assert chunk.tolist() == expert.flatten().tolist()


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("entries", "many"), [(200_000, 3), (50_000, 3), (50_000, 1), (30_000, 2)])
def test_threads_have_no_say_in_what_is_counted(
    entries: int, many: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *experts = (normal(seed, entries).bfloat16() for seed in range(1 + many))
    experts[-1][7] = float("nan")
    before = torch.get_num_threads()
    for clean in (False, True):
        found = []
        for chunk, count in ((1 << 20, 1), (1 << 20, threads), (5000, 1), (5000, threads)):
            monkeypatch.setattr(trim, "CHUNK", chunk)
            searches = [ThresholdSearch(0.2) for _ in experts]
            torch.set_num_threads(count)
            try:
                with Crew() as crew:
                    count_task_vectors(base, experts, searches, crew, clean=clean)
                assert torch.get_num_threads() == count
            finally:
                torch.set_num_threads(before)
            sums = [search.take_sums() for search in searches]
            done = [math.isnan(sums[n][0]) or search.finish() for n, search in enumerate(searches)]
            found.append((sums, done, [search.threshold for search in searches], [s.entries for s in searches]))
        for one, several in (found[:2], found[2:]):
            assert repr(one) == repr(several)  # to the last bit, NaN included
        assert found[0][1:] == found[2][1:]
        assert math.isnan(found[0][0][-1][0]) != clean


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0x7F800000), (5, 6), (0, BINS), (0, BINS + 1), (7, BINS + 7), (1 << 29, 1 << 30)]
)
def test_a_bracket_fits_its_bins(low: int, high: int) -> None:
    bracket = Bracket(low, high)
    assert 1 <= bracket.bins <= BINS
    assert (high - 1 - low) >> bracket.shift == bracket.bins - 1
    assert bracket.shift == 0 or bracket.bins > BINS // 2


# What experts differ in


def test_variance_is_over_the_experts() -> None:
    updates = torch.tensor([[[1.0, 2.0, 0.0], [1.0, -2.0, 3.0]]])
    assert variances(updates).tolist() == [[0.0, 4.0, 2.25]]


def test_one_expert_differs_from_the_base_alone() -> None:
    assert variances(torch.tensor([[2.0, -3.0]])).tolist() == [4.0, 9.0]


def test_order_of_the_experts_has_no_say() -> None:
    updates = torch.randn(50, 7, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(variances(updates), variances(updates.flip(1)))


@pytest.mark.parametrize(("density", "kept"), [(1.0, 5), (0.7, 4), (0.5, 3), (0.21, 2), (0.2, 1), (0.1, 1)])
def test_the_largest_left_out_keeps_the_share_above_it(density: float, kept: int) -> None:
    values = torch.tensor([4.0, 1.0, 3.0, 5.0, 2.0])
    largest = largest_left_out(values.clone(), density)
    assert int((values > largest).sum()) == kept


def test_zeroes_the_same_entries_of_all_experts() -> None:
    updates = torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 4.0]])
    keep_differing_(updates, variances(updates), 0.2)
    assert updates.tolist() == [[0.0, 2.0, 3.0], [0.0, -2.0, 4.0]]
