"""What has been described so far, beside the file that is being made: a line per neuron, one file per process.

Lines are appended as batches are finished. A run that is killed leaves them, and the next one goes on, on as many
processes as it likes. A line that was cut short, or is none of ours, is passed over with all behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from neuron_methods.models.processes import process_state
from neuron_methods.support.documents import Given, parse_json, read_bytes, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_text
from neuron_methods.support.runs import note

#: (key of the layer, neuron).
Neuron = tuple[str, int]
_MARK = ".unfinished-"


class Judgement(Given):
    """What a describer says of one neuron: a line, and how likely it holds each name for, log-likelihoods in nats."""

    description: str
    likelihoods: list[Annotated[float, Field(le=0)]]


class _Line(Judgement):
    layer: str
    neuron: Annotated[int, Field(ge=0)]


class Journal:
    """The judgements of earlier runs and of this one.

    Args:
        output: the file that is being made.
        belongs_to: digest of everything that must be the same to go on.
        names: how many likelihoods a judgement has.
    """

    def __init__(self, output: Path, belongs_to: str, names: int) -> None:
        state = process_state()
        self._output = output
        self._head = json.dumps({"belongs_to": belongs_to})
        self._names = names
        self.path = output.with_name(f"{output.name}{_MARK}{state.process_index}-of-{state.num_processes}")
        self.found: dict[Neuron, Judgement] = {}

    def open(self, known: Mapping[Neuron, Judgement]) -> None:
        """Read what all processes of earlier runs left, and put it into one file; every process calls this at once.

        Args:
            known: what needs no line.
        """
        state = process_state()
        files = self._files()
        for path in files:
            self.found |= self._read(path)
        state.wait_for_everyone()
        if state.is_main_process:
            if self.found:
                kept = [self._line(neuron, judgement) for neuron, judgement in self.found.items()]
                write_text(self.path, "\n".join((self._head, *kept, "")))
            for path in files:
                if path != self.path or not self.found:
                    path.unlink(missing_ok=True)
        state.wait_for_everyone()
        self.found = {**known, **self.found}

    def add(self, judged: Mapping[Neuron, Judgement]) -> None:
        """Keep the judgements of a batch."""
        self.found |= judged
        lines = [self._line(neuron, judgement) for neuron, judgement in judged.items()]
        if not self.path.exists():
            lines.insert(0, self._head)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n".join((*lines, "")))

    def remove(self) -> None:
        """Remove this process's file, as the work is finished."""
        self.path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        start = f"{self._output.name}{_MARK}"
        return sorted(path for path in self._output.parent.iterdir() if path.name.startswith(start))

    def _line(self, neuron: Neuron, judgement: Judgement) -> str:
        line = {"layer": neuron[0], "neuron": neuron[1], **judgement.model_dump()}
        return json.dumps(line, ensure_ascii=False)

    def _read(self, path: Path) -> dict[Neuron, Judgement]:
        found: dict[Neuron, Judgement] = {}
        try:
            head, *lines = read_bytes(path).split(b"\n")
            if head.decode(errors="replace") != self._head:
                note(f"{path}: of another profile, describer or settings: not gone on with")
                return {}
            for text in lines[:-1]:  # behind the last line break there is nothing, or a line that was cut short
                line = validated(parse_json(text, str(path)), _Line, str(path))
                if len(line.likelihoods) != self._names:
                    break
                found[line.layer, line.neuron] = Judgement(description=line.description, likelihoods=line.likelihoods)
        except UserError:
            pass
        return found
