"""What our command adds to one run of mergekit: checks before, progress and checks during, facts for the summary.

A session goes with the options that mergekit hands to its planner (`SessionOptions`). There
`planning.attach_to_planner` finds it, shows it the plan and wraps each tensor's task with `MergeSession.merging`.
mergekit's own methods pass through it as well as ours.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.architecture.base import ModelArchitecture
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor
from tqdm import tqdm

from neuron_methods.methods.contract import PreparedMerge
from neuron_methods.methods.share import Share
from neuron_methods.plugin.seam import planned_tasks
from neuron_methods.support.errors import UserError
from neuron_methods.support.finite import ADVICE, is_finite, largest
from neuron_methods.support.kept import Kept
from neuron_methods.support.progress import progress_bar


@dataclass(eq=False)
class MergeSession:
    """One run of `mergekit-neuron merge`.

    Attributes:
        on_plan: called with mergekit's planner once the plan stands, before any tensor is merged; it may refuse by
            raising `UserError`.
        on_tensor: called with (name, {model: input}, merged tensor) for every tensor that is merged and not copied;
            returns something for JSON.
        allow_nonfinite: go on where a tensor holds NaN or Inf.
        quiet: no progress bars.
        architecture: that mergekit is to plan by, where it has been chosen.
        prepared: the merge by a method of ours, None for mergekit's own methods.
        common: what this merge shares with others of its kind, see `PreparedMerge.common`.
        planned_tensors: how many tensors mergekit's planner has planned, 0 as long as it has not.
        seed: that chance in the merge of a tensor goes by, with the tensor's name; None: it is not set.
        traces: {tensor: what its merge told; for JSON}, of those that are merged and not yet written.
        share: which part of what is measured this process looks at.
        on_done: called with the number of tensors that were merged since the last call.
        narrow: float16, where the plan rounds to that as it writes.
    """

    on_plan: Callable[[Any], None] = lambda _planner: None
    on_tensor: Callable[[str, Mapping[Hashable, Tensor], Tensor], Any] | None = None
    allow_nonfinite: bool = False
    quiet: bool = False
    architecture: ModelArchitecture | None = None
    prepared: PreparedMerge | None = None
    common: Kept | None = None
    planned_tensors: int = 0
    seed: int | None = None
    share: Share = field(default_factory=Share)
    on_done: Callable[[int], None] = lambda _count: None
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    narrow: torch.dtype | None = None
    _bar: tqdm | None = field(default=None, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def adopt(self, prepared: PreparedMerge) -> None:
        """Take note of the merge by a method of ours, and give it what it shares with others."""
        self.prepared = prepared
        prepared.common = self.common

    def planned(self, planner: Any) -> None:
        """Take note of the plan."""
        self.planned_tensors = len(planned_tasks(planner))
        if dtype_from_name(planner.config.out_dtype) == torch.float16:
            self.narrow = torch.float16
        self.on_plan(planner)

    @contextmanager
    def merging(
        self, name: str, tensors: Mapping[Hashable, Tensor]
    ) -> Iterator[Callable[[Tensor | None], Tensor | None]]:
        """Surround the merge of one tensor.

        Args:
            name: the output tensor's.
            tensors: {model: tensor}, the inputs.

        Yields:
            A function that passes the merged tensor through, if it is sound.

        Raises:
            UserError: the result holds NaN or Inf, or the method failed, because an input does.
        """
        self._open_bar()
        if self.seed is not None:  # by tensor, so that it does not matter which was merged before, and where
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7], "big"))
        trace: dict[str, Any] = {}

        def inspect(merged: Tensor | None) -> Tensor | None:
            if merged is not None and not is_finite(merged):
                if not self.allow_nonfinite:
                    raise _nonfinite_result(name, tensors, merged.dtype)
                trace["nonfinite"] = True
            elif merged is not None and self.narrow is not None and overflows(merged, self.narrow):
                if not self.allow_nonfinite:
                    raise _overflow(name, self.narrow, merged)
                trace["nonfinite"] = True
            if merged is not None and self.on_tensor is not None and len(tensors) > 1:
                trace["seen"] = self.on_tensor(name, tensors, merged)
            return merged

        try:
            yield inspect
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            if not self.allow_nonfinite and (culprits := nonfinite_inputs(tensors)):
                raise _nonfinite_input(name, culprits) from None
            if any(not tensor.is_floating_point() for tensor in tensors.values()):
                raise UserError(f"{name}: the models hold integers here, and not the same ones ({error})") from None
            raise
        if self.prepared is not None:
            told = [teller.told.get(name, {}) for teller in self.prepared.tellers()]
            trace |= {"told": told} if any(told) else {}
        self.traces[name] = trace
        self._open_bar().update()
        self.on_done(1)

    def done_elsewhere(self, count: int) -> None:
        """Let the progress bar tell of tensors that another process has merged; from any thread."""
        self._open_bar().update(count)

    def _open_bar(self) -> tqdm:
        with self._lock:
            if self._bar is None:
                self._bar = progress_bar(
                    total=self.planned_tensors, what="Merging tensors", unit="tensor", shown=not self.quiet
                )
            return self._bar

    def close(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.close()


class SessionOptions(MergeOptions, frozen=True):
    """mergekit's options, and the session of the command that runs with them."""

    session: Any = None

    @classmethod
    def of(cls, options: MergeOptions, session: MergeSession) -> SessionOptions:
        """Send `session` along with `options`."""
        return cls.model_construct(**dict(options), session=session)


def session_of(options: MergeOptions) -> MergeSession | None:
    """Find the session that goes with a planner's options; None under mergekit's own commands."""
    return getattr(options, "session", None)


def nonfinite_inputs(tensors: Mapping[Hashable, Tensor]) -> list[Hashable]:
    """List the models whose tensor holds NaN or Inf."""
    return [model for model, tensor in tensors.items() if not is_finite(tensor)]


def _nonfinite_input(name: str, culprits: list[Hashable]) -> UserError:
    loaders = [LoaderCache().get(model) for model in culprits if isinstance(model, ModelReference)]
    stored = [loader.get_tensor(name) for loader in loaders if name in loader.index.tensor_paths]
    if stored and len(stored) == len(culprits) and all(map(is_finite, stored)):  # `dtype` has rounded them
        return _overflow(name, torch.float16, max(stored, key=largest))
    return UserError(f"{name}: NaN or Inf in {', '.join(map(str, culprits))}; {ADVICE}")


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a tensor of finite values has some that become infinite in `dtype`."""
    return largest(tensor) > torch.finfo(dtype).max


def _overflow(name: str, dtype: torch.dtype, values: Tensor) -> UserError:
    spelled, most = str(dtype).removeprefix("torch."), largest(values)
    return UserError(
        f"{name}: its values go up to {most:.3g}, and {spelled}, which the YAML asks for, ends at "
        f"{torch.finfo(dtype).max:g}; write bfloat16 or float32 there instead"
    )


def _nonfinite_result(name: str, tensors: Mapping[Hashable, Tensor], dtype: torch.dtype) -> UserError:
    if culprits := nonfinite_inputs(tensors):
        return _nonfinite_input(name, culprits)
    if dtype == torch.float16:
        return UserError(
            f"{name}: the merge is too large for float16, in which it is written, though all inputs are finite; write "
            "out_dtype: bfloat16 or float32, or smaller weights"
        )
    return UserError(
        f"{name}: the merge came out as NaN or Inf though all inputs are finite; are the weights too large, or 0 in "
        "all?"
    )
