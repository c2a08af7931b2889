"""HTML pages of one look: one file that needs no network, light or dark as the reader's system is."""

from __future__ import annotations

import html

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #ffffff; --line: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #9aa4af; --page: #15191f; --line: #3a424d; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 46rem; color: var(--text); margin-top: .5rem; }
details { color: var(--soft); margin-top: .25rem; max-width: 46rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--line); font-weight: normal; vertical-align: top; } th { color: var(--soft); }
"""


def page(title: str, body: str, style: str = "") -> str:
    """Write a page.

    Args:
        title: its title and heading, as text.
        body: HTML below the heading.
        style: CSS beside that of all pages.
    """
    shown = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{shown}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
<h1>{shown}</h1>
{body}
</main>
</body>
</html>
"""


def table_of_facts(facts: dict[str, str]) -> str:
    """Write a table of names and what they are, both as text."""
    rows = (f"<tr><th scope=row>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return "\n".join(("<table>", *rows, "</table>"))
