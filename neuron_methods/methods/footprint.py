"""What mergekit's own methods hold in memory while they merge one tensor, measured on mergekit 0.1.5."""

from __future__ import annotations

from collections.abc import Callable

#: Methods of which every entry of the result depends on the same entry of the inputs alone.
ENTRYWISE = frozenset({"linear", "task_arithmetic"})

# Copies of the tensor, the result included and the inputs not, for t inputs (the base is one of them): in float32, and
# in 16 bits, where some compute in float32 all the same.
_COPIES: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
    "arcee_fusion": (lambda t: 5, lambda t: 9),
    "breadcrumbs": (lambda t: 5 + t, lambda t: 11 + t),
    "breadcrumbs_ties": (lambda t: max(5 + t, 3 * t), lambda t: max(11 + t, 3 * t + 2)),
    "dare_linear": (lambda t: 2 + t, lambda t: 2 + t),
    "dare_ties": (lambda t: 3 * t, lambda t: 3 * t + 2),
    "della": (lambda t: max(8 + t, 3 * t), lambda t: max(12 + t, 3 * t + 2)),
    "della_linear": (lambda t: 8 + t, lambda t: 12 + t),
    "karcher": (lambda t: 5 + t, lambda t: 5 + t),
    "linear": (lambda t: 2, lambda t: 4),
    "model_stock": (lambda t: 3 + t, lambda t: 3 + t),
    "multislerp": (lambda t: 3 + 4 * t, lambda t: 3 + 4 * t),
    "nearswap": (lambda t: 5, lambda t: 5),
    "nuslerp": (lambda t: 6, lambda t: 6),
    "passthrough": (lambda t: 1, lambda t: 1),
    "ram": (lambda t: 0.5 + 5.25 * t, lambda t: 5 + 5.5 * t),
    "ramplus_tl": (lambda t: 0.5 + 5.25 * t, lambda t: 9.5 * t),
    "sce": (lambda t: 3.25 * t, lambda t: 4.5 * t),
    "slerp": (lambda t: 2, lambda t: 6),
    "task_arithmetic": (lambda t: 1 + t, lambda t: 1 + t),
    "ties": (lambda t: 3 * t, lambda t: max(12 + t, 3 * t + 2)),
}


def bytes_of_method(name: str, entries: int, inputs: int, itemsize: int) -> int:
    """Estimate what a method of mergekit takes for one tensor beyond its inputs, its result included.

    Args:
        name: of the method; of one that mergekit does not bring along as much as the hungriest takes is assumed.
        entries: of the tensor.
        inputs: how many models have it, the base included.
        itemsize: bytes per entry of the dtype that inputs come in.
    """
    wide, narrow = _COPIES.get(name, _COPIES["ram"])
    return int((narrow if itemsize < 4 else wide)(inputs) * entries * itemsize)
