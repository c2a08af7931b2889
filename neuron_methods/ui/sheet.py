"""The YAML of one who looks at the page, with the form beside it: either may be edited, and the other follows.

What the browser sends of the YAML may be late: what the page wrote there before it wrote something else. Nothing is
written where nothing changes, so that the comments of a YAML stay until the form has something to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from neuron_methods.support.errors import UserError
from neuron_methods.ui.form import Form, fields_of, read_form, with_models, with_setting

_LATE = 50  # texts that may still be under way to the browser and back


@dataclass(frozen=True)
class Sheet:
    """The YAML and the form.

    Attributes:
        text: of the YAML.
        form: as it stands on the page.
        earlier: what the page has written into the YAML since somebody has typed there.
        drawing: grows whenever the fields of the parameters have to be drawn anew.
    """

    text: str = ""
    form: Form = field(default_factory=Form)
    earlier: tuple[str, ...] = ()
    drawing: int = 0

    def with_models(self, base: str, experts: Sequence[str], method: str, dtype: str) -> Sheet:
        """Write base, experts, method and dtype of the form into the YAML.

        Raises:
            UserError: the YAML cannot be read, or says more than the form has room for.
        """
        form = self.form
        if (base, tuple(experts), method, dtype) == (form.base, form.experts, form.method, form.dtype):
            return self
        anew = int(method != form.method or len(experts) != len(form.experts))
        found = self._written(with_models(self.text, base, experts, method, dtype))
        return replace(found, drawing=self.drawing + anew)

    def with_setting(self, name: str, value: str) -> Sheet:
        """Write what stands in a parameter's field into the YAML; errors as of `with_models`, or of the value."""
        default = next((asked.default for asked in fields_of(self.form.method) if asked.name == name), "")
        if dict(self.form.settings).get(name, default) == value:
            return self
        return self._written(with_setting(self.text, name, value))

    def typed(self, text: str) -> Sheet:
        """Take the YAML as the browser has it, unless that is what the page has written there; the form stays."""
        return self if text == self.text or text in self.earlier else replace(self, text=text, earlier=())

    def left(self, text: str) -> Sheet:
        """Take the YAML as the browser has it, now that it is done with, and let the form follow where it has room."""
        typed = self.typed(text)
        if typed.text != text:  # late
            return self
        try:
            form = read_form(text)
        except UserError:
            return typed
        return typed if form == self.form else Sheet(text, form, (), self.drawing + 1)

    def _written(self, text: str) -> Sheet:
        return replace(self, text=text, form=read_form(text), earlier=(self.text, *self.earlier)[:_LATE])
