"""The model that every point is tried on: its weights are replaced in place, its tasks' inputs are made once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from neuron_methods.evaluation.examples import Examples
from neuron_methods.evaluation.models import ModelSpec, OpenedModel, open_held, open_model
from neuron_methods.evaluation.scoring import RunningTask, TaskResult, start_opened
from neuron_methods.evaluation.tasks import Task
from neuron_methods.evaluation.tuning.parts import NotAffine, Parts, StateDict, check_parts, find_parts
from neuron_methods.evaluation.tuning.recipe import Recipe, is_number, split_point
from neuron_methods.evaluation.tuning.search import Point, key_of, show_point
from neuron_methods.models.loading import computing_dtype
from neuron_methods.models.processes import of_first
from neuron_methods.plugin.in_memory import merged_in_memory
from neuron_methods.plugin.merging import merge_to_directory
from neuron_methods.support.errors import UserError
from neuron_methods.support.kept import Kept
from neuron_methods.support.memory import NoRoom, free_memory
from neuron_methods.support.runs import remove, workplace
from neuron_methods.support.text import format_bytes

_WORK = "mergekit-neuron-tune"
# From so many merges on that differ in cheap parameters alone, what they have in common is worth keeping: to decompose
# a system takes as long as to solve it two or three times.
_WORTH_KEEPING = 3


@dataclass
class Effort:
    """What a search has cost.

    Attributes:
        points: tried; others were in the trace.
        recombined: those of them that took no merge.
        merges: run for them, those for parts and checks among them.
        merge_seconds: time they took, with loading what they wrote.
        seconds: time in all.
    """

    points: int = 0
    recombined: int = 0
    merges: int = 0
    merge_seconds: float = 0.0
    seconds: float = 0.0


class Bench:
    """Tries points of a recipe on tasks; `effort` is what they have cost so far."""

    def __init__(
        self,
        recipe: Recipe,
        tasks: Sequence[tuple[Task, Examples]],
        *,
        dtype: str = "auto",
        seed: int = 0,
        shortcut: bool = True,
        folder: Path | None = None,
        progress: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Get ready; nothing is merged or loaded before the first point.

        Args:
            recipe: what is merged.
            tasks: with their examples of the validation split.
            dtype: the model computes in; ``auto`` as for `open_model`.
            seed: of intervals.
            shortcut: recombine parts where parameters enter linearly, and keep what merges by other values of a cheap
            parameter have in common.
            folder: where a merge's tokenizer and config are, for a moment, and all of it where memory has no room;
                None: where temporary files go.
            progress: show a bar per task, on a terminal.
            say: takes lines for the user.
        """
        self.recipe, self.tasks, self.seed = recipe, tasks, seed
        self.shortcut, self.say = shortcut, say
        # Where bars are lines, those of the points are enough.
        self.progress = progress and sys.stderr.isatty()
        self.effort = Effort()
        self._dtype, self._within = dtype, folder
        self._out_dtype: torch.dtype | None = None
        self._open = ExitStack()
        self._opened: OpenedModel | None = None
        self._names: set[str] = set()
        self._running: list[RunningTask] = []
        self._parts: Parts | None = None
        self._parts_of = ""
        self._not_affine: set[str] = set()
        self._kept: Kept | None = None
        self._kept_of = ""
        self._room = True  # for merges in memory, as far as is known

    def __enter__(self) -> Bench:
        self._folder = self._open.enter_context(workplace(_WORK, self._within))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._opened, self._running, self._parts, self._kept = None, [], None, None
        self._open.close()

    def try_points(self, points: Sequence[Point], expected: int = 0) -> Iterator[tuple[Point, list[TaskResult], str]]:
        """Score points, those that share parts one after the other.

        Args:
            points: to try.
            expected: how many more may come, to tell whether parts are worth their merges.

        Yields:
            (point, results, ``recombined`` or ``merged``).
        """
        groups: dict[str, list[Point]] = {}
        for point in points:
            _, others = split_point(point, self._linear(point))
            groups.setdefault(key_of(others), []).append(point)
        families: dict[str, list[str]] = {}
        for key, group in groups.items():
            families.setdefault(self._family(group[0]), []).append(key)
        for key in (key for family in families.values() for key in family):
            group = groups[key]
            sharing = sum(len(groups[other]) for other in families[self._family(group[0])])
            self._keep(group[0], sharing + expected)
            linear = self._linear(group[0])
            _, others = split_point(group[0], linear)
            sharing = len(group) + (expected if not others else 0)
            worth_it = sharing > len(linear) + 2 or (self._parts is not None and self._parts_of == key)
            for point in group:
                self.effort.points += 1
                numbers, _ = split_point(point, linear)
                affine = linear and worth_it and all(map(is_number, numbers.values()))
                if affine and self._find(key, linear, others, group):
                    self._put(self._parts.combine(numbers))
                    self.effort.recombined += 1
                    yield point, self.score(), "recombined"
                else:
                    with self.merged(point) as tensors:
                        self._put(tensors.items())
                    yield point, self.score(), "merged"

    def confirm(
        self, point: Point, test: Sequence[tuple[Task, Examples]] = ()
    ) -> tuple[dict[str, float], float | None, list[TaskResult]]:
        """Merge a point for real, and score that.

        Args:
            point: the best one.
            test: tasks with their test examples.

        Returns:
            (validation scores by task, the largest difference of a weight from its recombined value in shares of its
            tensor's largest weight or None without parts, results on the test examples).
        """
        linear = self._linear(point)
        numbers, others = split_point(point, linear)
        self._kept = None
        known = self._parts is not None and self._parts_of == key_of(others) and all(map(is_number, numbers.values()))
        with self.merged(point) as tensors:
            difference = 0.0 if known else None
            if known:
                for name, tensor in self._parts.combine(numbers):
                    if not tensor.numel():
                        continue
                    rounded = self._rounded(tensor)
                    largest = max(float(rounded.abs().max()), torch.finfo(torch.float32).tiny)
                    off = float((rounded.float() - tensors[name].cpu().float()).abs().max())
                    difference = max(difference, off / largest)
            self._put(tensors.items())
        scores = {result.name: result.score for result in self.score()}
        on_test = [start_opened(self._opened, task, "test", examples, self.seed) for task, examples in test]
        return scores, difference, [running.run(self.progress) for running in on_test]

    def score(self) -> list[TaskResult]:
        """Score the model as it stands, on every task."""
        return [running.run(self.progress) for running in self._running]

    @contextmanager
    def merged(self, point: Mapping[str, Any], exact: bool = False) -> Iterator[StateDict]:
        """Merge for real, and give the tensors by the names of the model in memory while the block lasts."""
        started = time.perf_counter()
        made = 0 if self._kept is None else self._kept.made
        self._let_go()
        with self._merged_model(self.recipe.source_at(point, exact), "float32" if exact else self._dtype) as opened:
            self.effort.merges += 1
            if self._kept is not None and self._kept.made > made:
                self._say_kept(self._kept, point)
            tensors = distinct_tensors(opened.model)
            if any(tensor.is_meta for tensor in tensors.values()):
                raise UserError("the model does not fit into memory: tune needs all of its weights there")
            if self._opened is None:
                self._adopt(opened)
            self.effort.merge_seconds += time.perf_counter() - started
            yield tensors

    @contextmanager
    def _merged_model(self, source: str, dtype: str) -> Iterator[OpenedModel]:
        """Merge in memory, or where that has no room in a directory that is removed after the block."""
        name, number = self.recipe.name, self.effort.merges
        seed, computing = self.seed + number, computing_dtype(dtype)
        merge = merged_in_memory(
            source, config_name=name, seed=seed, dtype=computing, common=self._kept, within=self._folder
        )
        with ExitStack() as stack:
            if self._room:
                try:
                    held = stack.enter_context(merge)
                except NoRoom as error:
                    self._room = False
                    self.say(f"{error}: merged on disk, and removed when scored")
                else:
                    opened = stack.enter_context(open_held(held, dtype))
                    held.tensors.clear()
                    yield opened
                    return
            out = self._folder / f"merge-{number}"
            options = MergeOptions(random_seed=seed)
            stack.callback(remove, out)
            merge_to_directory(
                source, out, progress=False, config_name=name, common=self._kept, options=options, resume=False
            )
            yield stack.enter_context(open_model(str(out), dtype))

    def _family(self, point: Point) -> str:
        """Tell points apart that differ in more than cheap and linear parameters."""
        alike = {*self.recipe.cheap(point), *self._linear(point)}
        return key_of({name: value for name, value in point.items() if name not in alike})

    def _keep(self, point: Point, merges: int) -> None:
        """Have merges of a point's family share what they have in common, if there are enough of them."""
        family = self._family(point)
        if self._kept_of == family and self._kept is not None:
            return
        self._kept, self._kept_of = None, family
        if self.shortcut and merges >= _WORTH_KEEPING and self.recipe.cheap(point):
            free = of_first(free_memory())  # or what one process solves anew would differ in its last bits
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._kept = Kept(None if free is None else free // 2 // here)

    def _say_kept(self, kept: Kept, point: Mapping[str, Any]) -> None:
        names = ", ".join(self.recipe.cheap(point))
        room = f"; no room for {len(kept.without)} more, which are solved anew" if kept.without else ""
        self.say(
            f"{names}: {kept.count} matrices decomposed once for all values, {format_bytes(kept.nbytes)} kept{room}"
        )

    def _linear(self, point: Point) -> list[str]:
        """List the parameters to find parts for at a point."""
        if not self.shortcut:
            return []
        linear = self.recipe.linear(list(point), point)
        return [] if ",".join(linear) in self._not_affine else linear

    def _find(self, key: str, linear: list[str], others: Point, group: Sequence[Point]) -> bool:
        """Have the parts of a group at hand; False, and said aloud, where the merge is no sum of parts."""
        if self._parts_of == key and self._parts is not None:
            return True
        if ",".join(linear) in self._not_affine:
            return False
        self._parts = None

        def merged_at(values: dict[str, float]) -> StateDict:
            with self.merged({**others, **values}, exact=True) as tensors:
                if not any(values.values()):  # the first
                    check_parts(sum(tensor.numel() for tensor in tensors.values()), len(linear))
                return {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in tensors.items()}

        # The largest value of each is where a deviation shows most; all different, to tell sums from products.
        check_at = {}
        for number, name in enumerate(linear):
            tried = [abs(point[name]) for point in group if is_number(point[name])]
            check_at[name] = max(2.0, *tried) + 0.25 * number
        before = self.effort.merges
        try:
            self._parts = find_parts(linear, merged_at, check_at)
        except NoRoom as error:
            self._not_affine.add(",".join(linear))
            self.say(f"no shortcut: {error}; every point is merged by itself")
            return False
        except NotAffine as error:
            self._not_affine.add(",".join(linear))
            self.say(
                f"no shortcut: the merge is not linear in {', '.join(linear)} ({error}); "
                "every point is merged by itself"
            )
            return False
        self._parts_of = key
        where = f" at {show_point(others)}" if others else ""
        self.say(
            f"linear in {', '.join(linear)}{where}: parts found and checked by {self.effort.merges - before} merges, "
            f"{self._parts.bytes / 1e6:.0f} MB"
        )
        return True

    def _adopt(self, opened: OpenedModel) -> None:
        """Make a model that was just loaded the one that all points are tried on."""
        self._opened = opened
        stored = getattr(ModelSpec.parse(self.recipe.base).config, "dtype", None)
        self._out_dtype = _dtype(self.recipe.out_dtype) or _dtype(stored)
        computing = _dtype(computing_dtype(self._dtype)) or self._out_dtype
        if computing is not None:
            opened.model.to(computing)
        self._names = {*distinct_tensors(opened.model)}
        self._running = [start_opened(opened, task, "validation", examples, self.seed) for task, examples in self.tasks]

    def _let_go(self) -> None:
        """Free what the next merge replaces; the model's weights are there again once they are put."""
        if self._opened is not None:
            for tensor in self._own().values():
                tensor.data = tensor.data.new_empty(0)

    def _put(self, tensors: Any) -> None:
        """Replace weights, rounded as the merge would write them."""
        own = self._own()
        for name, tensor in tensors:
            # Not into the memory of the old ones, which may be gone, or the new ones' own.
            own[name].data = self._rounded(tensor).to(own[name].device, own[name].dtype)

    def _own(self) -> StateDict:
        """The tensors themselves of the model that all points are tried on, by the names in `distinct_tensors`."""
        model = self._opened.model
        everyone = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        return {name: tensor for name, tensor in everyone.items() if name in self._names}

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """Round a tensor as the merge does when it writes."""
        if self._out_dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(self._out_dtype)


def distinct_tensors(model: Any) -> StateDict:
    """Collect a model's parameters and saved buffers; what is tied stands once, under its first name."""
    seen: set[tuple[int, torch.Size]] = set()
    tensors: StateDict = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.is_meta or place not in seen:
            seen.add(place)
            tensors[name] = tensor
    return tensors


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Find a dtype by its name; None for `auto` and where a config does not say."""
    return name if isinstance(name, torch.dtype) else getattr(torch, name or "auto", None)
