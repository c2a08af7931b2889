"""The state of an unfinished measurement, saved beside its file now and then, one file per process."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuron_methods.models.processes import process_state
from neuron_methods.support.documents import open_file
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import file_in_place_after
from neuron_methods.support.runs import note


class Record(Protocol):
    """One of the things that are recorded, of which each knows its state as tensors."""

    def state(self) -> dict[str, Tensor]:
        """Hand out everything recorded so far."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Tell whether `state` may have returned this, by shapes and dtypes."""


class Recording(Protocol):
    """What is recorded, by name."""

    @property
    def records(self) -> Mapping[str, Record]:
        """Name -> record."""


class Checkpoint:
    """What this process has measured so far.

    A state that belongs to something else, to another number of processes for instance, is passed over, and so is one
    that is damaged.

    Args:
        output: the file that is being made.
        belongs_to: everything that must be the same to go on.
        seconds: how much time passes between savings.
    """

    def __init__(self, output: Path, belongs_to: dict[str, Any], seconds: float) -> None:
        state = process_state()
        self.path = output.with_name(f"{output.name}.unfinished-{state.process_index}-of-{state.num_processes}")
        self._belongs_to = json.dumps(belongs_to, sort_keys=True)
        self._seconds = seconds
        self._last = time.monotonic()

    def load(self, recorder: Recording) -> int:
        """Let `recorder` go on from the state; returns how many batches it has seen, 0 if there is none."""
        states = {}
        try:
            open_file(self.path, str(self.path)).close()  # safetensors waits for a pipe
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("belongs_to") != self._belongs_to:
                    note(f"{self.path}: of other data or settings, so it is not gone on with")
                    return 0
                batches = metadata.get("batches", "")
                if not re.fullmatch("[0-9]{1,15}", batches):
                    return 0
                for key, record in recorder.records.items():
                    found = {name: file.get_tensor(f"{key}/{name}") for name in record.state()}
                    if not record.fits(found):
                        return 0
                    states[key] = found
        except (OSError, SafetensorError, UserError):
            return 0
        for key, state in states.items():
            recorder.records[key].load_state(state)
        return int(batches)

    def save_if_due(self, recorder: Recording, batches: int) -> None:
        """Save the state after `batches` batches if the last time is long enough ago."""
        if time.monotonic() - self._last < self._seconds:
            return
        states = {
            f"{key}/{name}": values.cpu().contiguous()
            for key, record in recorder.records.items()
            for name, values in record.state().items()
        }
        with file_in_place_after(self.path) as beside:
            save_file(states, beside, metadata={"belongs_to": self._belongs_to, "batches": str(batches)})
        self._last = time.monotonic()

    def remove(self) -> None:
        """Remove the state, as the measurement is finished."""
        self.path.unlink(missing_ok=True)
