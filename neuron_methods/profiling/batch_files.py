"""What would be asked of a model that is served elsewhere, and its answers: JSON lines in the usual batch format.

Nothing is sent from here. A request has `custom_id`, `method`, `url` and `body`; an answer `custom_id` and `response`,
whose body is a chat completion, or `error`. The id tells profile, layer and neuron. Such answers tell no likelihood, so
their labels have no confidence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from neuron_methods import __version__
from neuron_methods.neurons.profile_file import NeuronProfile
from neuron_methods.profiling.describing import Selection, check_place, finish, inputs_of
from neuron_methods.profiling.journal import Neuron
from neuron_methods.profiling.labels_file import NeuronLabel, NeuronLabels
from neuron_methods.profiling.prompts import described, names_to_choose_from, to_do_both
from neuron_methods.support.documents import Foreign, parse_json, read_lines, validated
from neuron_methods.support.errors import UserError
from neuron_methods.support.files import write_text
from neuron_methods.support.runs import claimed
from neuron_methods.support.targets import beginning_with, check_file
from neuron_methods.support.text import format_bytes, shortened, unknown

_URL = "/v1/chat/completions"
_ID = r"([0-9a-f]{16})-(\d+)-(\d+)"
_IS_PROMPTS = beginning_with(rf'\{{"custom_id": "{_ID}"')
_MEND = "put an answer that can be read in its place, or remove the line and give --allow-missing"


class _Answer(Foreign):
    description: str
    group: str


class _Message(Foreign):
    content: str


class _Choice(Foreign):
    message: _Message


class _Completion(Foreign):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    model: str = ""


class _Response(Foreign):
    status_code: int = 200
    body: Any = None


class _Line(Foreign):
    custom_id: str
    response: _Response | None = None
    error: Any = None


def export(
    profile: Path,
    file: Path,
    model: str,
    selection: Selection,
    *,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write what would be asked about each neuron.

    Args:
        profile: of the base, measured on texts.
        file: to write.
        model: as the server calls it.
        selection: which neurons.
        force: replace such a file.
        report: called with a line for the user.

    Raises:
        UserError: anything is wrong with profile or file.
    """
    place = check_file(file, f"--export-prompts {file}", _IS_PROMPTS, force, inputs_of(profile))
    measured = NeuronProfile.load(profile)
    names = names_to_choose_from(measured)
    neurons = selection.of(measured)
    lines = []
    for custom_id, neuron in _ids(measured, neurons).items():
        body = {"model": model, "messages": to_do_both(neurons[neuron], names)}
        request = {"custom_id": custom_id, "method": "POST", "url": _URL, "body": body}
        lines.append(json.dumps(request, ensure_ascii=False) + "\n")
    text = "".join(lines)
    with claimed(place, f"--export-prompts {file}"):
        write_text(place, text)
    report(f"{len(lines)} prompts, {format_bytes(len(text.encode()))}, with text of the data in them; nothing was sent")


def import_into(
    profile: Path,
    answers: Path,
    output: Path,
    selection: Selection,
    *,
    allow_missing: bool = False,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Turn answers to exported prompts into labels and their page.

    Args:
        profile: that the prompts were made of.
        answers: JSON lines.
        output: the file of labels; the page goes beside.
        selection: as at the export.
        allow_missing: leave neurons without an answer out, instead of refusing.
        force: replace labels at `output`.
        report: called with lines for the user.

    Raises:
        UserError: an answer is none, is of another profile, missing, there twice, or names an unknown group.
    """
    place, page = check_place(output, force, [*inputs_of(profile), answers])
    measured = NeuronProfile.load(profile)
    names = names_to_choose_from(measured)
    neurons = selection.of(measured)
    ids = _ids(measured, neurons)
    found, models = read_answers(answers, ids, measured, names)
    missing = [custom_id for custom_id, neuron in ids.items() if neuron not in found]
    if not found or (missing and not allow_missing):
        raise UserError(
            f"{answers}: {len(missing)} of {len(ids)} answers are missing, the first is {missing[0]}; ask for them and "
            "add them, or give --allow-missing"
        )
    made_from = {
        "profile": measured.digest,
        "describer": described(", ".join(sorted(filter(None, models)))) or "not told",
        "answers": answers.name,
        "contexts": selection.contexts,
        "made_with": __version__,
    }
    info, labels = measured.info, [found[neuron] for neuron in neurons if neuron in found]
    place_of = {layer: number for number, layer in enumerate(measured.layers)}
    labels.sort(key=lambda label: (place_of[label.layer], label.neuron))
    with claimed(place, f"-o {output}", pair=page):
        made = NeuronLabels(info.model, info.model_type, info.weights, names, labels, made_from)
        finish(measured, made, neurons, place, report)


def read_answers(
    answers: Path, ids: Mapping[str, Neuron], profile: NeuronProfile, names: Sequence[str]
) -> tuple[dict[Neuron, NeuronLabel], set[str]]:
    """Read answers of a served model.

    Args:
        answers: JSON lines.
        ids: of what was asked.
        profile: that it was made of.
        names: of the groups.

    Returns:
        A label of each neuron that was answered, and the names of the models that did.

    Raises:
        UserError: a line is no answer, of another profile, there twice, or names an unknown group.
    """
    found: dict[Neuron, NeuronLabel] = {}
    models = set()
    for where, content in read_lines(answers, again=_MEND):
        line = validated(content, _Line, where, _MEND)
        neuron = _neuron_of(line.custom_id, ids, profile, where)
        if neuron in found:
            raise UserError(f"{where}: custom_id {line.custom_id} was answered before; keep one of its answers")
        completion = _completion_of(line, where)
        models.add(completion.model)
        found[neuron] = _label_of(completion, neuron, names, where)
    return found, models


def _ids(profile: NeuronProfile, neurons: dict[Neuron, list[str]]) -> dict[str, Neuron]:
    digest, numbers = profile.digest, {layer: number for number, layer in enumerate(profile.layers)}
    return {f"{digest}-{numbers[layer]}-{neuron}": (layer, neuron) for layer, neuron in neurons}


def _neuron_of(custom_id: str, ids: Mapping[str, Neuron], profile: NeuronProfile, where: str) -> Neuron:
    if custom_id in ids:
        return ids[custom_id]
    parts, shown = re.fullmatch(_ID, custom_id), shortened(custom_id)
    if parts is None:
        raise UserError(f"{where}: custom_id {shown} is none of --export-prompts; {_MEND}")
    if parts[1] != profile.digest:
        raise UserError(f"{where}: custom_id {shown} is of another profile than {profile.path}; name that profile")
    raise UserError(f"{where}: custom_id {shown} was not asked; give --layers, --limit and --seed as at the export")


def _completion_of(line: _Line, where: str) -> _Completion:
    response = line.response
    if line.error is not None or response is None or response.status_code != 200:
        told = line.error if line.error is not None else response.status_code if response else "no response"
        raise UserError(f"{where}: no answer but an error, {shortened(told)}; {_MEND}")
    return validated(response.body, _Completion, f"{where}, response.body", _MEND)


def _label_of(completion: _Completion, neuron: Neuron, names: Sequence[str], where: str) -> NeuronLabel:
    said = completion.choices[0].message.content
    start, end = said.find("{"), said.rfind("}") + 1  # models put fences around it
    if not 0 <= start < end:
        raise UserError(f"{where}: the answer holds no JSON object, found {shortened(said)}; {_MEND}")
    answer = validated(
        parse_json(said[start:end], f"{where}, the answer", _MEND), _Answer, f"{where}, the answer", _MEND
    )
    known = {name.casefold(): name for name in names}
    group = answer.group if answer.group in names else known.get(answer.group.strip().casefold())
    if group is None:
        raise UserError(f"{where}: {unknown('group', answer.group, names)}; {_MEND}")
    return NeuronLabel(*neuron, group, None, described(answer.description))
