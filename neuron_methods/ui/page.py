"""The page itself: what is on it, and what happens when something of it is typed or pressed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from neuron_methods.sharing.recipes import all_recipes
from neuron_methods.support.documents import read_text
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import one_line
from neuron_methods.ui.checks import look_at_models, look_at_yaml
from neuron_methods.ui.form import NAME, Field, Form, about_method, fields_of, methods, read_form
from neuron_methods.ui.jobs import Desk, Job
from neuron_methods.ui.places import Root
from neuron_methods.ui.sheet import Sheet
from neuron_methods.ui.showing import Finding, findings, job_told, refusal, report_page

_DTYPES = [("as the inputs", ""), "bfloat16", "float16", "float32"]
_THERE = [("stop and say so", ""), ("go on with an unfinished merge", "--resume"), ("replace it", "--force")]
_PLAN, _MERGE, _PAUSE, _CANCEL = "Dry run", "Merge", "Pause", "Cancel"
_HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# One after the other, each on the YAML that the one before has written: the browser's may not have arrived there yet.
_EDIT: dict[str, Any] = {"concurrency_id": "edit", "concurrency_limit": 1, **_HIDDEN}


@dataclass
class Page:
    """What is on the page.

    Attributes:
        root: where paths start from.
        desk: where jobs are given in.
        alone: whether all who look at the page are one: the user of this machine.
        start: the YAML to start from.
        pushes: whether what is merged may be uploaded from here.
    """

    root: Root
    desk: Desk
    alone: bool
    start: str = ""
    pushes: bool = True

    def build(self) -> gr.Blocks:
        """Put it together."""
        self.begun = Sheet().left(self.start)
        with gr.Blocks(title="mergekit-neuron") as blocks:
            gr.Markdown("# mergekit-neuron\nMerge fine-tuned models. The form writes the YAML; the YAML is what runs.")
            with gr.Row():
                with gr.Column(min_width=360):
                    self._models()
                    self._method(blocks)
                with gr.Column(min_width=360):
                    self._yaml()
                    self._merge()
            self.drawn = gr.HTML(elem_id="drawn", elem_classes="told")
            with gr.Row():
                with gr.Column(min_width=360):
                    self._try()
                if self.pushes:
                    with gr.Column(min_width=360):
                        self._push()
            self._wire(blocks)
        return blocks

    def _models(self) -> None:
        gr.Markdown("## Models", elem_classes="head")
        self.base = gr.Textbox(
            self.begun.form.base,
            label="Base",
            info="What the experts were fine-tuned from: a directory, or an id of the Hub (USER/NAME)",
            elem_id="base",
            autofocus=True,
        )
        self.experts = gr.Textbox(
            "\n".join(self.begun.form.experts),
            label="Experts",
            info="One a line: a directory, an id of the Hub, an adapter, or base+adapter",
            lines=3,
            elem_id="experts",
        )
        self.found = gr.HTML(elem_id="found", elem_classes="told")

    def _method(self, blocks: gr.Blocks) -> None:
        gr.Markdown("## Method", elem_classes="head")
        known = [(f"{name} ({method.spec.pretty_name})", name) for name, method in methods().items()]
        with gr.Row():
            self.method = gr.Dropdown(
                known, label="Method", value=self.begun.form.method or None, elem_id="method", scale=2, min_width=240
            )
            self.dtype = gr.Dropdown(
                _DTYPES, label="dtype", value=self.begun.form.dtype, elem_id="dtype", min_width=170
            )
        self.about = gr.Markdown(about_method(self.begun.form.method), elem_id="about")
        self.drawing = gr.State(self.begun.drawing)
        self.sheet = gr.State(self.begun)
        gr.render(inputs=[self.sheet], triggers=[blocks.load, self.drawing.change])(self._parameters)

    def _parameters(self, sheet: Sheet) -> None:
        """Draw the fields of a method's parameters."""
        form = sheet.form
        fields = fields_of(form.method)
        for each, title in (
            (True, "Of each expert: one value for all, or one each with commas"),
            (False, "Of the merge"),
        ):
            if chosen := [asked for asked in fields if asked.each == each]:
                gr.Markdown(title)
                with gr.Row():
                    for asked in chosen:
                        self._field(asked, form)

    def _field(self, asked: Field, form: Form) -> None:
        beyond = asked.name in form.beyond
        value = dict(form.settings).get(asked.name, asked.default)
        common: dict[str, Any] = {
            "label": asked.name,
            "info": "the YAML says more of it than fits in here" if beyond else asked.about,
            "interactive": not beyond,
            "elem_id": f"parameter-{asked.name}",
            "min_width": 220,
        }
        component: Any
        if not beyond and asked.kind == "words":
            component = gr.Dropdown(list(asked.words), value=value, allow_custom_value=True, **common)
        else:
            component = gr.Textbox("" if beyond else value, placeholder=asked.default, **common)
        component.change(
            partial(self._set, asked.name), [self.sheet, component], self.written, trigger_mode="always_last", **_EDIT
        )

    def _yaml(self) -> None:
        gr.Markdown("## YAML", elem_classes="head")
        recipes = [recipe.name for recipe in all_recipes() if len(recipe.stages) == 1]
        self.recipe = gr.Dropdown(recipes, label="Start from a recipe", value=None, elem_id="recipe")
        self.yaml = gr.Textbox(
            self.start, label="What runs", lines=14, max_lines=40, elem_id="yaml", elem_classes="yaml", buttons=["copy"]
        )
        self.yaml_found = gr.HTML(_looked_at(self.start), elem_id="yaml-found", elem_classes="told")

    def _merge(self) -> None:
        gr.Markdown("## Merge", elem_classes="head")
        with gr.Row():
            self.out = gr.Textbox("merged", label="Output", elem_id="out", min_width=200)
            self.there = gr.Dropdown(_THERE, label="If it is there", value="", elem_id="there", min_width=200)
            self.device = gr.Dropdown(["cpu", "auto"], label="Device", value="cpu", elem_id="device", min_width=110)
        with gr.Row():
            self.report = gr.Checkbox(True, label="Draw a report", elem_id="report")
            self.adapter = gr.Checkbox(False, label="Write an adapter (rank 64)", elem_id="adapter")
        with gr.Row():
            self.plan = gr.Button(_PLAN, elem_id="plan", min_width=120)
            self.merge = gr.Button(_MERGE, variant="primary", elem_id="merge", min_width=120)
            self.pause = gr.Button(_PAUSE, interactive=False, elem_id="pause", min_width=120)
            self.cancel = gr.Button(_CANCEL, variant="stop", interactive=False, elem_id="cancel", min_width=120)
        self.told = gr.HTML(elem_id="told", elem_classes="told")

    def _try(self) -> None:
        gr.Markdown("## Try", elem_classes="head")
        self.prompt = gr.Textbox(label="Prompt", info="As it is, without a chat template", lines=2, elem_id="prompt")
        self.image = gr.Image(label="or an image, for classifiers", type="filepath", format="png", height=160)
        self.ask = gr.Button("Ask base, experts and output", elem_id="ask")
        self.tried = gr.HTML(elem_id="tried", elem_classes="told")

    def _push(self) -> None:
        gr.Markdown("## Push", elem_classes="head")
        self.repository = gr.Textbox(
            label="Repository", info="USER/NAME on the Hub; the token is that of `hf auth login`", elem_id="repository"
        )
        self.private = gr.Checkbox(True, label="Private, if it is new", elem_id="private")
        self.push = gr.Button("Push the output", elem_id="push")
        self.pushed = gr.HTML(elem_id="pushed", elem_classes="told")

    @property
    def written(self) -> list[Any]:
        """What is written whenever the YAML or the form changes."""
        return [self.sheet, self.yaml, self.yaml_found, self.about, self.drawing]

    def _wire(self, blocks: gr.Blocks) -> None:
        form = [self.base, self.experts, self.method, self.dtype]
        # Gradio 6.31 tells of `input` in a text only where a key writes a letter; not of what is pasted or removed.
        for component in form:
            component.change(self._apply, [self.sheet, *form], self.written, trigger_mode="always_last", **_EDIT)
        self.yaml.change(
            self._type, [self.sheet, self.yaml], [self.sheet, self.yaml_found], trigger_mode="always_last", **_EDIT
        )
        taken = self.recipe.input(self._take, [self.recipe], [self.yaml], **_EDIT)
        for event in (taken.then, self.yaml.blur):
            told = event(self._leave_yaml, [self.sheet, self.yaml], [*self.written, *form], **_EDIT)
            told.then(partial(self._look, True), [self.base, self.experts], [self.found], **_HIDDEN)
        for component in (self.base, self.experts):
            for listener, ask in ((component.change, False), (component.blur, True)):
                look = partial(self._look, ask)
                listener(look, [self.base, self.experts], [self.found], trigger_mode="always_last", **_HIDDEN)
        buttons = [self.plan, self.merge, self.pause, self.cancel]
        shown = [self.told, self.drawn, *buttons]
        more: dict[str, Any] = {"concurrency_limit": None, **_HIDDEN}
        self.plan.click(self._run_plan, [self.yaml, self.out], shown, **more)
        settings = [self.yaml, self.out, self.there, self.device, self.report, self.adapter]
        self.merge.click(self._run_merge, settings, shown, **more)
        self.pause.click(self._pause, [], [], **more)
        self.cancel.click(self._cancel, [], [], **more)
        asked = [self.yaml, self.out, self.prompt, self.image]
        self.ask.click(self._run_ask, asked, [self.tried, *buttons], **more)
        if self.pushes:
            given = [self.out, self.repository, self.private]
            self.push.click(self._run_push, given, [self.pushed, *buttons], **more)
        blocks.load(self._follow, [], shown, **more)
        if not self.alone:
            blocks.unload(self._leave)

    # ------------------------------------------------------------------------------------------- form and YAML

    def _apply(self, sheet: Sheet, base: str, experts: str, method: str | None, dtype: str | None) -> Any:
        return _edited(sheet, lambda: sheet.with_models(base.strip(), _listed(experts), method or "", dtype or ""))

    def _set(self, name: str, sheet: Sheet, value: str | None) -> Any:
        return _edited(sheet, lambda: sheet.with_setting(name, value or ""))

    def _type(self, sheet: Sheet, yaml: str) -> Any:
        found = sheet.typed(yaml)
        return gr.skip() if found is sheet else (found, _looked_at(yaml))

    def _leave_yaml(self, sheet: Sheet, yaml: str) -> Any:
        found = sheet.left(yaml)
        if found is sheet:
            return gr.skip()
        method = found.form.method if found.form.method in methods() else None
        form = found.form.base, "\n".join(found.form.experts), method, found.form.dtype
        return *_shown(found, _looked_at(yaml)), *form

    def _take(self, recipe: str | None) -> Any:
        """The text of a recipe; nothing where the list was only passed by."""
        return next((found.text for found in all_recipes() if found.name == recipe), gr.skip())

    def _look(self, ask_hub: bool, base: str, experts: str) -> str:
        return findings(look_at_models(self.root, base, _listed(experts), ask_hub=ask_hub))

    # ------------------------------------------------------------------------------------------------- what runs

    def _run_plan(self, yaml: str, out: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        def begin() -> Job:
            self.root.check_yaml(yaml, NAME)
            place = self.root.path(out, "output")
            return Job("plan", ["merge", "--dry-run", "--", "-", str(place)], self.root.place, yaml)

        yield from self._run(begin, request)

    def _run_merge(
        self, yaml: str, out: str, there: str, device: str, report: bool, adapter: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        def begin() -> Job:
            self.root.check_yaml(yaml, NAME)
            place = self.root.path(out, "output")
            given = [there, "--report" * report, "--as-adapter" * adapter]
            shown = os.path.expanduser(out.strip())
            arguments = ["merge", "--device", device, *filter(None, given), "--", "-", shown]
            return Job("merge", arguments, self.root.place, yaml, place)

        yield from self._run(begin, request)

    def _run_ask(
        self, yaml: str, out: str, prompt: str, image: str | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        def begin() -> Job:
            self.root.check_yaml(yaml, NAME)
            form = read_form(yaml)
            place = self.root.path(out, "output")
            models = [model for model in (form.base, *form.experts) if model] + [str(place)] * place.is_dir()
            if not models:
                raise UserError("choose models first")
            given = [f"--image={image}"] if image and not prompt.strip() else [f"--prompt={prompt}"]
            return Job("answers", ["generate", *given, "--", *dict.fromkeys(models)], self.root.place)

        for told, _, *buttons in self._run(begin, request):
            yield told, *buttons

    def _run_push(self, out: str, repository: str, private: bool, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        def begin() -> Job:
            place = self.root.path(out, "output")
            given = ["--private"] * private
            return Job("push", ["push", *given, "--", str(place), repository.strip()], self.root.place)

        for told, _, *buttons in self._run(begin, request):
            yield told, *buttons

    def _run(self, begin: Callable[[], Job], request: gr.Request) -> Iterator[tuple[Any, ...]]:
        try:
            job = self.desk.start(self._owner(request), begin)
        except UserError as error:
            yield self._view(refusal(one_line(error)), running=False)
            return
        yield from self._followed(job)

    def _follow(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Show, on a page that has just been opened, the job that runs."""
        job = self.desk.of(self._owner(request))
        if job is not None and job.code is None:
            yield from self._followed(job)
        else:
            yield self._view("", running=False)

    def _followed(self, job: Job) -> Iterator[tuple[Any, ...]]:
        for _ in job.follow():
            yield self._view(job_told(job), running=job.code is None, drawn=_drawn(job))

    def _view(self, told: str, *, running: bool, drawn: str = "") -> tuple[Any, ...]:
        names = ((_PLAN, not running), (_MERGE, not running), (_PAUSE, running), (_CANCEL, running))
        return told, drawn, *(gr.update(value=name, interactive=active) for name, active in names)

    def _pause(self, request: gr.Request) -> None:
        self.desk.end(self._owner(request), "paused")

    def _cancel(self, request: gr.Request) -> None:
        self.desk.end(self._owner(request), "cancelled")

    def _leave(self, request: gr.Request) -> None:
        self.desk.leave(self._owner(request))

    def _owner(self, request: gr.Request) -> str:
        return "" if self.alone else str(request.session_hash)


def _looked_at(yaml: str) -> str:
    return findings([look_at_yaml(yaml)])


def _edited(sheet: Sheet, edit: Callable[[], Sheet]) -> Any:
    """What the page shows after an edit: all as it was, and why, where the edit is none."""
    try:
        found = edit()
    except UserError as error:
        return _shown(sheet, findings([Finding(False, one_line(error))]))
    return gr.skip() if found is sheet else _shown(found, _looked_at(found.text))


def _shown(sheet: Sheet, told: str) -> tuple[Any, ...]:
    return sheet, sheet.text, told, about_method(sheet.form.method), sheet.drawing


def _listed(experts: str) -> list[str]:
    return [line.strip() for line in experts.splitlines() if line.strip()]


def _drawn(job: Job) -> str:
    """The report of a merge that has ended well, if it has one."""
    if job.code != 0 or job.out is None:
        return ""
    page = job.out / "report" / "report.html"
    try:
        return report_page(read_text(page)) if page.is_file() else ""
    except UserError as error:
        return refusal(one_line(error))
