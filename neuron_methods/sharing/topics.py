"""The sections of the recipes' document, as topics that `mergekit-neuron help` shows in a terminal."""

from __future__ import annotations

import re
from dataclasses import dataclass

from neuron_methods.sharing.recipes import only_one, recipes_directory
from neuron_methods.support.errors import UserError

_FENCE = "```"
_LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")


@dataclass(frozen=True)
class Topic:
    """A section: its name is that of its heading in an address, its text has the sections within it, too."""

    name: str
    title: str
    text: str


def topics() -> list[Topic]:
    """Read all sections, in their order.

    Raises:
        UserError: the package was installed without its documents.
    """
    path = recipes_directory() / "README.md"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; install mergekit-neuron again") from error
    headings, is_code = [], False
    for number, line in enumerate(lines):
        is_code ^= line.startswith(_FENCE)
        if not is_code and re.match("##+ ", line):
            headings.append((number, len(line) - len(line.lstrip("#"))))
    found = []
    for place, (number, level) in enumerate(headings):
        end = next((after for after, deeper in headings[place + 1 :] if deeper <= level), len(lines))
        title = lines[number].lstrip("# ").replace("`", "")
        text = "\n".join(lines[number:end]).strip()
        name = re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))
        found.append(Topic(name, title, _LINK.sub(_linked, text)))
    return found


def _linked(link: re.Match[str]) -> str:
    """Write a link for a terminal: addresses are kept, places beside the document are not there."""
    text, place = link.groups()
    return f"{text} ({place})" if "://" in place else text


def find_topic(name: str) -> Topic:
    """Find a section by its name, or by a word of it that no other has.

    Raises:
        UserError: there is none, or several.
    """
    wanted = name.lower()
    known = topics()
    found = [topic for topic in known if topic.name == wanted]
    found = found or [topic for topic in known if wanted in topic.name.split("-")]
    return only_one("topic", name, {t.name: t for t in found}, [t.name for t in known], "mergekit-neuron help")
