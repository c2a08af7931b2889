"""The recipes that ship with the package: find them, show them, fill in somebody's own models.

A recipe is `FAMILY/METHOD-WHAT.yml`, a merge configuration whose comments teach; its first line says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import yaml

import neuron_methods
from neuron_methods.support.errors import UserError
from neuron_methods.support.local_names import local_names
from neuron_methods.support.text import did_you_mean, one_line, printable, shortened

Found = TypeVar("Found")

#: How a filled recipe begins.
FILLED = "# After the recipe "
#: What it is called, as far as nobody says.
CALLED = "merge.yml"


@dataclass(frozen=True)
class Recipe:
    """One recipe: the text of a file, under the name FAMILY/FILE without its ending."""

    name: str
    text: str

    @property
    def family(self) -> str:
        """llama, t5 or vit."""
        return self.name.partition("/")[0]

    @property
    def title(self) -> str:
        """Its first comment line."""
        return self.text.splitlines()[0].lstrip("# ").rstrip(".")

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Its configurations: one, but for those of `mergekit-multi`."""
        return list(yaml.safe_load_all(self.text))

    @property
    def method(self) -> str:
        """Name of the method; of several stages the last one's."""
        return str(self.stages[-1]["merge_method"])

    @property
    def is_filled(self) -> bool:
        """Whether all models are named, and no place is left for the user's own."""
        return "path/to/your/" not in self.text

    def has_all(self, parameter: str) -> bool:
        """Tell whether every expert of its first stage has a parameter of its own."""
        return all(parameter in (entry.get("parameters") or {}) for entry in self.stages[0]["models"])


def recipes_directory() -> Path:
    """Find the recipes: in the installed package, or beside it in a checkout."""
    package = Path(neuron_methods.__file__).parent
    for place in (package / "recipes", package.parent / "recipes"):
        if place.is_dir():
            return place
    raise UserError(f"{package}: installed without recipes; install mergekit-neuron again")


def all_recipes() -> list[Recipe]:
    """Read all recipes, by family and name."""
    place = recipes_directory()
    files = sorted(place.glob("*/*.yml"))
    return [Recipe(f"{file.parent.name}/{file.stem}", file.read_text(encoding="utf-8")) for file in files]


def find_recipe(name: str) -> Recipe:
    """Find the recipe of a name, with or without its family and its ending.

    Raises:
        UserError: there is none, or several.
    """
    wanted = name.removesuffix(".yml").removeprefix("recipes/")
    recipes = all_recipes()
    found = [r for r in recipes if r.name == wanted] or [r for r in recipes if r.name.partition("/")[2] == wanted]
    return only_one(
        "recipe", name, {r.name: r for r in found}, [r.name for r in recipes], "mergekit-neuron recipes list"
    )


def only_one(what: str, name: str, found: Mapping[str, Found], known: Sequence[str], lists: str) -> Found:
    """Give what was found, by its name, of all that are known.

    Raises:
        UserError: it is nothing, or several; `lists` is the command that shows what there is.
    """
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UserError(f"{what} {name}: there are several: {', '.join(found)}")
    raise UserError(f"no {what} {name}{did_you_mean(name, known)} (`{lists}` lists all)")


def new_recipe(family: str, method: str, base: str, experts: Sequence[str], file: str = CALLED) -> str:
    """Fill somebody's own models, by path or id, into a recipe of a family; what it says of parameters stays.

    Args:
        family: llama, t5 or vit.
        method: its YAML name, for the recipe that fits best and needs no data, or a recipe's whole name.
        base: the base model.
        experts: the experts; names of what is measured on each are made from theirs.
        file: what the recipe will be called, for the commands that it names.

    Raises:
        UserError: no such recipe, or no expert, or one twice.
    """
    families = list(dict.fromkeys(recipe.family for recipe in all_recipes()))
    if family not in families:
        raise UserError(f"no recipes for {family}; there are: {', '.join(families)}")
    of_family = [r for r in all_recipes() if r.family == family and len(r.stages) == 1]
    if not experts:
        raise UserError("a merge needs experts: --expert PATH-OR-ID, once for each")
    if not all(name.strip() for name in (base, *experts)):
        raise UserError("--base or --expert is empty; name a model by its path or id")
    plain = [expert.rstrip("/") for expert in experts]
    if twice := next((expert for expert in plain if plain.count(expert) > 1), None):
        raise UserError(f"--expert {twice}: is given twice")
    named = [r for r in of_family if r.name == f"{family}/{method}"]
    if named:
        return _filled(named[0], base, experts, file)
    methods = list(dict.fromkeys(r.method for r in of_family))
    if method not in methods:
        meant = did_you_mean(method, [r.name.partition("/")[2] for r in of_family])
        raise UserError(f"no recipe for {family} by {method}; there are: {', '.join(methods)}{meant}")
    adapters = "+" in experts[0]
    fitting = [r for r in of_family if r.method == method]
    # One that asks for no data and takes the same kind of experts, and rather a known set-up than the small one.
    recipe = min(
        fitting,
        key=lambda r: (r.has_all("profile"), ("+" in str(r.stages[0]["models"])) != adapters, "small" in r.name),
    )
    with_data = next((r.name.partition("/")[2] for r in fitting if r.has_all("profile") and r is not recipe), None)
    more = f"With inputs measured on a few samples: mergekit-neuron recipes new {family} {with_data} ..."
    return _filled(recipe, base, experts, file, more if with_data else "")


def _filled(recipe: Recipe, base: str, experts: Sequence[str], file: str, more: str = "") -> str:
    lines = recipe.text.splitlines()
    # What stands before is about other models.
    begin = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    start = next(i for i, line in enumerate(lines) if line.startswith("models:"))
    end = next((i for i in range(start + 1, len(lines)) if re.match(r"[\w#]", lines[i])), len(lines))
    names = _names(experts)
    filled = [*lines[begin:start], "models:", *_expert_lines(recipe, names), *lines[end:]]
    several = "1 expert" if len(experts) == 1 else f"{len(experts)} experts"
    head = [
        f"{FILLED}{recipe.name}; what it says of models below is about its own.",
        f"# More of it: mergekit-neuron recipes show {recipe.name}",
        *([f"# {more}"] if more else []),
        "#",
        f"# {recipe.method} of {several} on {shortened(base, quote=False)}.",
        "#",
        *(f"#   {one_line(printable(step))}" for step in _steps(recipe, base, names, file)),
    ]
    text = "\n".join([*head, *filled]) + "\n"
    return re.sub(r"^base_model: .*$", lambda _: f"base_model: {_scalar(base)}", text, flags=re.MULTILINE)


def _names(experts: Sequence[str]) -> dict[str, str]:
    """Name what is measured on each expert, {expert: name}."""
    local = local_names([expert.rpartition("+")[2] for expert in experts])
    names: dict[str, str] = {}
    for expert in experts:
        plain = re.sub(r"[^\w-]+", "-", local[expert.rpartition("+")[2]]).strip("-") or "expert"
        wanted = chain([plain], (f"{plain}-{number}" for number in count(2)))
        names[expert] = next(name for name in wanted if name not in {"general", *names.values()})
    return names


def _expert_lines(recipe: Recipe, names: Mapping[str, str]) -> list[str]:
    """The list of models; what every expert has in the recipe, its group or the file of its inputs, it has here."""
    lines = []
    for expert, name in names.items():
        lines.append(f"  - model: {_scalar(expert)}")
        if recipe.has_all("group"):
            lines.append(f"    parameters: {{group: {_scalar(name)}}}   # as its data was called when groups were made")
        elif recipe.has_all("profile"):
            lines.append(f"    parameters: {{profile: {_scalar(f'{name}.inputs.safetensors')}}}")
    return lines


def _steps(recipe: Recipe, base: str, names: Mapping[str, str], file: str) -> list[str]:
    """The commands: what is measured first, each on data of one's own, and the merge."""
    steps = []
    if recipe.has_all("group"):
        data = " ".join(f"--data {name}=FILE:COLUMNS" for name in [*names.values(), "general"])
        steps += [f"profile {quote(base)} {data} -o base.safetensors", "groups base.safetensors -o groups.json"]
    elif recipe.has_all("profile"):
        for expert, name in names.items():
            steps.append(f"profile {quote(expert)} --inputs --data {name}=FILE:COLUMNS -o {name}.inputs.safetensors")
    return [f"mergekit-neuron {step}" for step in [*steps, f"merge {quote(file)} ./merged --report"]]


def _scalar(text: str) -> str:
    return yaml.safe_dump(text, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
