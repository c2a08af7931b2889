"""How the page looks, and what it shows of models, of jobs and of reports, as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import NamedTuple

from neuron_methods.ui.jobs import Job

#: Beside Gradio's own style, whose colours it takes: they are light or dark as the page is.
STYLE = """
.gradio-container { max-width: 90rem !important; --block-info-text-color: var(--neutral-600); }
.dark.gradio-container, .dark .gradio-container { --block-info-text-color: var(--neutral-400); }
.yaml textarea, .told pre { font-family: ui-monospace, Consolas, monospace; font-size: .85rem; line-height: 1.45; }
.head, .head * { overflow: visible !important; }  /* what could scroll, the keyboard would stop at */
.told pre { margin: .5rem 0 0; padding: .75rem; white-space: pre-wrap; overflow: auto; max-height: 24rem;
  color: var(--body-text-color); background: var(--background-fill-secondary); border-radius: .4rem;
  border: 1px solid var(--border-color-primary); }
.told p, .told ul { margin: .25rem 0; padding: 0; list-style: none; overflow-wrap: anywhere; }
.told { --good: #116329; --bad: #b3261e; } .dark .told { --good: #7ee2a0; --bad: #ff9d94; }
.told .good { color: var(--good); } .told .bad { color: var(--bad); }
.told .soft { color: var(--body-text-color-subdued); }
.told progress { width: 100%; height: .6rem; accent-color: var(--color-accent); }
.told iframe { width: 100%; height: 42rem; border: 1px solid var(--border-color-primary); border-radius: .4rem; }
.dark .light-alone, :root:not(.dark) body:not(.dark) .dark-alone { display: none; }
.told table { width: 100%; border-collapse: collapse; } .told td, .told th { text-align: left; vertical-align: top;
  padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.told td { white-space: pre-wrap; } .told th { width: 30%; font-weight: 600; }
"""


class Finding(NamedTuple):
    """What was found about something that stands in the form: whether it is right, wrong (False) or not known yet."""

    right: bool | None
    text: str


def findings(found: Iterable[Finding]) -> str:
    """Show findings, a line each."""
    marks = {True: ("good", "✓"), False: ("bad", "✗"), None: ("soft", "·")}
    lines = [
        f'<li class="{marks[right][0]}">{marks[right][1]} {html.escape(text)}</li>' for right, text in found if text
    ]
    return f'<ul role="status">{"".join(lines)}</ul>' if lines else ""


def refusal(text: str) -> str:
    """Show why something was not begun."""
    return f'<p class="bad" role="alert">{html.escape(text)}</p>'


def job_told(job: Job) -> str:
    """Show how a job goes, or how it went, and what it has said."""
    lines = job.lines
    if job.code is None:
        head = _running(job)
    elif job.code == 0:
        head = f'<p class="good" role="status">{html.escape(job.what)}: done</p>'
    elif job.ended == "cancelled":
        head, lines = f'<p role="status">{html.escape(job.what)}: cancelled; nothing is left of it</p>', []
    elif job.ended:
        head = f'<p role="status">{html.escape(job.what)}: stopped; what is finished of it is kept</p>'
    else:
        error = next((line for line in reversed(lines) if line.startswith("error: ")), "")
        lines = [line for line in lines if line != error]
        head = refusal(error.removeprefix("error: ") or f"{job.what}: ended with exit code {job.code}")
    said = html.escape("\n".join(lines))
    return head + (f'<pre tabindex="0" aria-label="What was said">{said}</pre>' if said else "")


def _running(job: Job) -> str:
    told = job.progress
    if told is None:
        return f'<p role="status">{html.escape(job.what)}: starting …</p><progress aria-label="Progress"></progress>'
    text = html.escape(f"{told.what}: {told.done} of {told.total}")
    return (
        f'<p role="status">{text}</p><progress aria-label="Progress" value="{told.done}" max="{told.total}"></progress>'
    )


def report_page(page: str) -> str:
    """Show the page of a report within this one, where it can run nothing and reach nothing; light or dark as this."""
    media = {"light": "not all", "dark": "all"}  # instead of the system's theme, which this page need not follow
    pages = {theme: html.escape(page.replace("(prefers-color-scheme: dark)", m)) for theme, m in media.items()}
    return "".join(
        f'<iframe class="{theme}-alone" title="Report" sandbox srcdoc="{shown}"></iframe>'
        for theme, shown in pages.items()
    )
