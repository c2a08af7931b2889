"""The page that lets people look at neurons: description, label and contexts of each, to search by layer and label.

One file that needs no network. All text of others stands in it as JSON, in which nothing begins a tag, and is put on
the page as text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neuron_methods.profiling.journal import Neuron
from neuron_methods.profiling.labels_file import NeuronLabels
from neuron_methods.support.files import pair_in_place_after
from neuron_methods.support.pages import page, table_of_facts
from neuron_methods.support.targets import beginning_with

_TITLE = "what makes its neurons fire"
#: Tells a page by its title.
IS_PAGE = beginning_with(
    rf"<!doctype html>[^<]*<html[^<]*<head>[^<]*<meta[^<]*<meta[^<]*<title>[^<]*: {_TITLE}</title>"
)
_CONTEXTS = 5  # of a neuron on the page

_STYLE = """
#find { display: flex; flex-wrap: wrap; gap: .75rem 1.5rem; margin: 1.5rem 0 .5rem; }
#find label { color: var(--soft); } #find input[type=search] { width: 18rem; }
select, input, button { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line);
  border-radius: 4px; padding: .15rem .4rem; }
#count { color: var(--soft); } #neurons td { overflow-wrap: anywhere; } #neurons td.number { white-space: nowrap; }
#neurons ol { margin: .25rem 0; padding-left: 1.5rem; } mark { background: none; color: inherit; font-weight: bold; }
.differs { color: var(--soft); }
"""

_BODY = """<form id="find">
<label>layer <select id="layer"></select></label>
<label>label <select id="group"></select></label>
<label>by activations <select id="other"></select></label>
<label><input type="checkbox" id="differing"> where the two differ</label>
<label>text <input type="search" id="text"></label>
</form>
<p id="count"></p>
<noscript><p>The list is made by the script in this page, which needs no network.</p></noscript>
<table id="neurons"><thead><tr><th>layer</th><th>neuron</th><th>label</th><th>by activations</th><th>what makes it fire
</th></tr></thead><tbody></tbody></table>
<p><button id="more" type="button">more</button></p>"""

_SCRIPT = """
const {contexts, neurons} = JSON.parse(document.getElementById("data").textContent);
const field = name => document.getElementById(name), body = document.querySelector("#neurons tbody"), STEP = 100;
let found = [], shown = 0;
function put(parent, name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}
function choices(name, column) {
  put(field(name), "option", "all").value = "";
  for (const value of new Set(neurons.map(n => n[column]).filter(v => v !== null))) put(field(name), "option", value);
}
function more() {
  for (const [layer, neuron, group, confidence, other, description, lines] of found.slice(shown, shown + STEP)) {
    const row = put(body, "tr");
    put(row, "td", layer).className = put(row, "td", neuron).className = "number";
    const sure = confidence === null ? "" : `, ${Math.round(100 * confidence)}\\u00a0%`;
    put(row, "td", group + sure).className = "number";
    put(row, "td", other === null ? "" : other).className = other === group ? "" : "differs";
    const cell = put(row, "td", description), list = put(put(cell, "details"), "ol");
    put(list.parentNode, "summary", "contexts");
    for (const line of lines) {
      const item = put(list, "li"), parts = /^(.*?)\\u00bb(.*?)\\u00ab(.*)$/.exec(contexts[line]);
      if (!parts) { item.textContent = contexts[line]; continue; }
      item.append(parts[1]); put(item, "mark", "\\u00bb" + parts[2] + "\\u00ab"); item.append(parts[3]);
    }
  }
  shown = Math.min(shown + STEP, found.length);
  field("count").textContent = `${found.length} of ${neurons.length} neurons, ${shown} shown`;
  field("more").hidden = shown === found.length;
}
function find() {
  const [layer, group, other] = ["layer", "group", "other"].map(name => field(name).value);
  const text = field("text").value.toLowerCase(), differing = field("differing").checked;
  found = neurons.filter(n => (!layer || n[0] === layer) && (!group || n[2] === group) && (!other || n[4] === other)
    && (!differing || n[2] !== n[4]) && (!text || (n[5] + "\\n" + n[1]).toLowerCase().includes(text)
    || n[6].some(line => contexts[line].toLowerCase().includes(text))));
  body.textContent = ""; shown = 0; more();
}
choices("layer", 0); choices("group", 2); choices("other", 4);
field("find").addEventListener("input", find);
field("find").addEventListener("submit", event => event.preventDefault());
field("more").addEventListener("click", more);
find();
"""


def write_with_page(
    labels: NeuronLabels,
    contexts: Mapping[Neuron, Sequence[str]],
    activations: Sequence[str] | str,
    agreement: str,
    place: Path,
) -> None:
    """Write labels, and the page beside them, together; arguments as for `neuron_page`.

    Raises:
        UserError: one of them cannot be written; both are as they were.
    """
    shown = neuron_page(labels, contexts, activations, agreement)
    with pair_in_place_after(place, place.with_suffix(".html")) as (file, page_file):
        labels.write(file)
        page_file.write_text(shown, encoding="utf-8")


def neuron_page(
    labels: NeuronLabels,
    contexts: Mapping[Neuron, Sequence[str]],
    activations: Sequence[str] | str,
    agreement: str,
) -> str:
    """Write the page.

    Args:
        labels: of the neurons on it.
        contexts: of each neuron, its token marked »so«.
        activations: each label's neuron's group by activations; or why there is none.
        agreement: of the two, in words.
    """
    numbers: dict[str, int] = {}
    groups = [None] * len(labels.labels) if isinstance(activations, str) else activations
    rows: list[list[Any]] = []
    for label, group in zip(labels.labels, groups, strict=True):
        lines = contexts.get((label.layer, label.neuron), ())[:_CONTEXTS]
        places = [numbers.setdefault(line, len(numbers)) for line in lines]
        rows.append([label.layer, label.neuron, label.group, label.confidence, group, label.description, places])
    facts = {
        "described by": str(labels.made_from.get("describer", "")),
        "labels": ", ".join(labels.groups),
        "neurons": f"{len(rows):,}",
        "agreement": agreement.partition(": ")[2],
    }
    data = json.dumps({"contexts": list(numbers), "neurons": rows}, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    scripts = f'<script type="application/json" id="data">{data}</script>\n<script>{_SCRIPT}</script>'
    return page(f"{labels.model}: {_TITLE}", "\n".join((table_of_facts(facts), _BODY, scripts)), _STYLE)
