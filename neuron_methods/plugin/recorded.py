"""What the YAML of a merge on record says beside its content: what was chosen for the heads.

mergekit's YAML has no word for that, so it stands in a comment, by which the merge can be made again.
"""

from __future__ import annotations

from itertools import takewhile

from neuron_methods.support.text import one_line

_HEAD_COMMENT = "# mergekit-neuron merge --head "


def recorded_head(source: str) -> str | None:
    """Find what the comments that a YAML's text begins with say of the heads, as `--head` takes it; None: nothing."""
    begun = takewhile(lambda line: line.startswith("#"), source.splitlines())
    said = next((line for line in begun if line.startswith(_HEAD_COMMENT)), "")
    return said.removeprefix(_HEAD_COMMENT).strip() or None


def with_head(source: str, head: str | None) -> str:
    """Have the text of a YAML say what `--head` is; None: what it says already."""
    if not head or head == recorded_head(source):
        return source
    others = [line for line in source.splitlines(keepends=True) if not line.startswith(_HEAD_COMMENT)]
    return f"{_HEAD_COMMENT}{one_line(head)}\n{''.join(others)}"
