"""One run of mergekit on one configuration: read, opened, checked, executed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mergekit.card
import mergekit.merge
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

import neuron_methods
from neuron_methods.models.headers import Header, HeaderFiles
from neuron_methods.plugin.adapter_planning import untied_notes
from neuron_methods.plugin.configuration import check_listed_once, read_configuration
from neuron_methods.plugin.differences import config_notes, dtype_notes, weight_notes
from neuron_methods.plugin.heads import Heads, heads_of_merge
from neuron_methods.plugin.inputs import opened_models
from neuron_methods.plugin.patches import arm
from neuron_methods.plugin.preflight import MergePlan, inspect_plan
from neuron_methods.plugin.reading import reading_ahead
from neuron_methods.plugin.recorded import recorded_head, with_head
from neuron_methods.plugin.seam import any_dtype_name, models_in_order, quiet_mergekit
from neuron_methods.plugin.session import MergeSession, SessionOptions
from neuron_methods.plugin.stored_architecture import statistics_of
from neuron_methods.plugin.structure import Unknown, check_structure, unknown_tensors
from neuron_methods.plugin.token_maps import compare_token_maps
from neuron_methods.plugin.tokenizer_sources import check_tokenizer_models
from neuron_methods.support.documents import parse_yaml
from neuron_methods.support.errors import UserError
from neuron_methods.support.fingerprints import code_digest
from neuron_methods.support.text import first_line, listed

# The YAML of a merge, beside its output.
CONFIG_NAME = "mergekit_config.yml"


# What the bytes of a merge depend on.
_VERSIONS = ("mergekit", "torch", "transformers", "safetensors", "peft")
_DECIDING = (
    "random_seed",
    "out_shard_size",
    "safe_serialization",
    "trust_remote_code",
    "lora_merge_dtype",
    "unsafe_truncate_embeddings",
)
# Parameters of our methods that name files; `rest_profile` is one, too.
_FILES = ("profile", "groups")


def named_files(content: Any) -> set[str]:
    """Find what a YAML says of files that our methods read, wherever in it their parameters stand."""
    if isinstance(content, list):
        return {file for part in content for file in named_files(part)}
    if not isinstance(content, dict):
        return set()
    own = (_texts(value) for key, value in content.items() if str(key).rpartition("_")[2] in _FILES)
    return set().union(*own, *(named_files(part) for part in content.values()))


def _texts(setting: Any) -> set[str]:
    """Find the texts that a parameter takes, by whatever filters."""
    if isinstance(setting, list):
        return {text for part in setting for text in _texts(part)}
    if isinstance(setting, dict):
        return _texts(setting.get("value"))
    return {setting} if isinstance(setting, str) else set()


class _PlanOnly(Exception):
    """Ends a run once its plan is known."""


class MergeRun:
    """A configuration and what becomes of it.

    Attributes:
        source: text of the YAML.
        name: file name for messages.
        configuration: as read.
        options: mergekit's.
        builds_tokenizer: whether mergekit makes the output's tokenizer out of the models'.
        plan: what will be done, as far as it is known.
        reads: tensors in the orders in which this process measures and merges them, once that is settled.
        heads: what becomes of heads that the method does not merge; None where there are none, or models not open.
    """

    def __init__(self, source: str, name: str, options: MergeOptions | None = None, head: str | None = None) -> None:
        """Read the YAML; `head` is as in `heads.heads_of_merge`.

        Raises:
            UserError: it cannot mean a merge, or mergekit is of a release that this package does not fit.
        """
        arm()
        self.source, self.name = source, name
        self.configuration = read_configuration(source, name)
        check_tokenizer_models(self.configuration, name)
        self.options = options or MergeOptions()
        self.builds_tokenizer = bool(self.configuration.tokenizer or self.configuration.tokenizer_source)
        self.plan = MergePlan(self.configuration.merge_method, None)
        self.heads: Heads | None = None
        self._head = head or recorded_head(source)
        self._notes: list[str] = []
        self.reads: list[list[str]] = []
        self._unknown = Unknown([], {})

    @property
    def recorded(self) -> str:
        """The YAML for the record, with what was chosen for the heads as a comment, by which it can be merged again."""
        return with_head(self.source, self._head)

    @property
    def donor(self) -> ModelReference:
        """The model that gives the output its config and tokenizer."""
        return self.configuration.base_model or self.configuration.referenced_models()[0]

    def paths_read(self) -> list[str]:
        """List the files and directories here that the merge reads."""
        models = list(models_in_order(self.configuration))
        models += [m for m in self.configuration.referenced_models() if m not in models]  # bases of adapters
        paths = [self.name, *(part.path for m in models for part in (m.model, m.lora) if part is not None)]
        paths += sorted(named_files(parse_yaml(self.source, self.name)))
        return [path for path in dict.fromkeys(paths) if os.path.exists(path)]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the models open and know how they fit each other.

        Raises:
            UserError: a model is not there, cannot be read, or is not like the others.
        """
        with opened_models(self.configuration, self.options):
            check_listed_once(self.configuration, self.name)
            self.heads, self._notes = heads_of_merge(self.configuration, self.options, self._head, self.name)
            planned = self.heads.architecture if self.heads is not None else None
            self.architecture = check_structure(self.configuration, self.options, self.name, planned)
            yield

    def inspect(self, planner: Any) -> None:
        """Check mergekit's plan against the headers of the models; `plan` tells the outcome.

        Raises:
            UserError: a tensor is missing or does not fit, or no method would merge what a model stores.
        """
        if self.heads is None:  # or what it does not merge is accounted for
            self._unknown = unknown_tensors(self.configuration, self.architecture, self.options)
        self.plan = inspect_plan(planner)
        if not self.builds_tokenizer:
            # In the YAML's order, the base first.
            merged = {
                m for weight, inputs, _ in self.plan.tensors if weight.vocabulary_axis is not None for m in inputs
            }
            models = [model for model in self.configuration.referenced_models() if model in merged]
            self.plan.notes += compare_token_maps(models, self.name) if len(models) > 1 else []
        if measured := sorted(statistics_of(self.architecture)):
            self.plan.notes.append(
                "measured, not learned, so averaged over the models, by their weights where they have such: "
                + listed(measured)
            )
        self.plan.notes += self._notes
        self.plan.notes += [
            *dtype_notes(self.plan, self.configuration),
            *weight_notes(self.plan, self.name),
            *config_notes(self.configuration, self.options.trust_remote_code),
            *untied_notes(self.configuration),
        ]
        for model in self.configuration.referenced_models():
            loader = LoaderCache().get(model)
            if reason := getattr(loader, "by_peft", None):
                self.plan.notes.append(f"{model.lora}: {reason}; peft merges it into a temporary directory first")
            if wrappers := getattr(loader, "wrappers", ""):
                self.plan.notes.append(f"{model}: read without {wrappers} in the names of its tensors")
        for model, names in self._unknown.of_experts.items():
            self.plan.notes.append(f"left out, as only {model} stores them and no method merges them: {listed(names)}")

    def made_from(self) -> dict[str, Any]:
        """Say what the output depends on beside the files of models: code, YAML, options, revisions; for JSON."""
        told: dict[str, Any] = {f"the version of {name}": version(name) for name in _VERSIONS}
        code = code_digest(Path(neuron_methods.__file__).parent)
        told["the version of mergekit-neuron"] = f"{neuron_methods.__version__} ({code})"
        told["the YAML"] = self.recorded
        for option in _DECIDING:
            told[f"--{option.replace('_', '-')}"] = getattr(self.options, option)
        told["--device"] = (self.options.device or "cpu").partition(":")[0]  # whichever of its kind
        for model in self.configuration.referenced_models():
            if not os.path.exists(model.model.path):
                # Its name there is that of the revision.
                told[str(model)] = Path(model.local_path(self.options.transformers_cache, ignore_lora=True)).name
        tensors = [(weight.name, size) for weight, _, size in self.plan.tensors]
        told["what is written"] = hashlib.sha256(repr(tensors).encode()).hexdigest()[:16]
        return told

    def headers_of_donor(self) -> dict[str, Header]:
        """Read the headers of all that the donor stores; models must be open."""
        headers, loader = HeaderFiles(), LoaderCache().get(self.donor.model_copy(update={"lora": None}))
        return {name: headers.behind(loader, name) for name in loader.index.tensor_paths}

    def unknown_of_base(self) -> dict[str, Header]:
        """Read the headers of what the base stores and mergekit's definition does not know; models must be open."""
        headers, loader = HeaderFiles(), LoaderCache().get(self.donor)
        return {name: headers.behind(loader, name) for name in self._unknown.of_base}

    def execute(self, staging: Path, session: MergeSession) -> None:
        """Let mergekit plan and merge into `staging`; models must be open.

        Raises:
            UserError: mergekit refuses the configuration, or the session a plan or a tensor.
        """
        update = {"quiet": True, "write_model_card": False, "copy_tokenizer": False}
        # A chat template goes with a tokenizer: the one mergekit builds, or the one `ModelOutput.begin` has copied.
        template = self.configuration.chat_template if self.builds_tokenizer else None
        configuration = self.configuration.model_copy(deep=True, update={"chat_template": template})
        session.architecture = self.architecture
        options = SessionOptions.of(self.options.model_copy(update=update), session)
        try:
            with (
                quiet_mergekit(),
                any_dtype_name(),
                reading_ahead(lambda: self.reads),
            ):
                mergekit.merge.run_merge(configuration, str(staging), options)
        except (RuntimeError, ValueError) as error:
            if session.planned_tensors:
                raise
            # Up to here mergekit has read the YAML and the models' configs, nothing else.
            raise UserError(f"{self.name}: {self._cured(first_line(error))}") from error

    def _cured(self, said: str) -> str:
        """What mergekit says of a configuration, with what to do about a base that lacks a parameter."""
        base = self.configuration.base_model
        lacking = re.match(rf"Missing required parameter (\w+) for {re.escape(str(base))}\.", said)
        if lacking is None:
            return said
        method, parameter = self.configuration.merge_method, lacking[1]
        return (
            f"{method} merges base_model {base} like the others, and it has no {parameter}; list it under models "
            f"with a {parameter}, or leave base_model out"
        )

    def plan_only(self, look: Callable[[Any], None], *, quiet: bool = True) -> None:
        """Let mergekit plan, and show `look` its checked plan while the models are open; nothing is merged or written.

        Raises:
            UserError: what the merge itself would refuse before it starts, and what `look` refuses.
        """

        def end_there(planner: Any) -> None:
            self.inspect(planner)
            look(planner)
            raise _PlanOnly

        # mergekit's planner writes nothing; its writer makes the directory when the first task runs.
        with self.opened(), suppress(_PlanOnly):
            self.execute(Path(os.devnull), MergeSession(on_plan=end_there, quiet=quiet))

    def write_card(self, staging: Path, name: str, library: str) -> None:
        """Write mergekit's README.md and the YAML, unless the options say not to."""
        if not self.options.write_model_card:
            return
        with suppress(Exception):  # whatever its template and huggingface_hub make of names: no merge fails by its card
            card = mergekit.card.generate_card(config=self.configuration, config_yaml=self.recorded.strip(), name=name)
            card = card.replace("library_name: transformers", f"library_name: {library}")
            (staging / "README.md").write_text(card, encoding="utf-8")
        (staging / CONFIG_NAME).write_text(self.recorded, encoding="utf-8")
