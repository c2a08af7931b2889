"""`mergekit-neuron ui`: a page in the browser that does what the commands do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import click

from neuron_methods.cli.common import FILE, PLACE, Count, debug_option, say

#: Where a page is this machine's own.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

EPILOG = """\b
Examples:
  mergekit-neuron ui
  mergekit-neuron ui --config merge.yaml --root ~/models
  mergekit-neuron ui --host 0.0.0.0 --port 7860 --root ./merges --no-browser

\b
The form writes the YAML, and the YAML is what runs: in a process of its own, by `mergekit-neuron merge`, so that all
holds that is promised there. It listens on this machine alone, unless --host says otherwise; then models, files and
outputs have to be in --root, whoever reaches the page can use all that is there, and the Hub is asked without a token
unless --use-token is given. Nothing that a model brings along is run. Ctrl-C ends it, and what it runs. It needs
Gradio: pip install 'mergekit-neuron[ui]'.
"""


def _hide_token() -> None:
    """Let this process and those it starts know of no token of the Hub; before huggingface_hub is imported."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
    os.environ |= {"HF_TOKEN_PATH": os.devnull, "HF_STORED_TOKENS_PATH": os.devnull}
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"


@click.command("ui", epilog=EPILOG)
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen at this address of the machine's.")
@click.option("--port", type=Count(most=65535), help="Listen at this port.  [default: the first free one from 7860 on]")
@click.option("--root", type=PLACE, help="Paths start here, and lead nowhere else.  [default: here, and anywhere]")
@click.option("--use-token", is_flag=True, help="Use the Hub's token of this machine for all whom --host lets in.")
@click.option("--config", type=FILE, help="Start from this YAML.")
@click.option("--no-browser", is_flag=True, help="Open no browser; print the address alone.")
@debug_option
def ui(host: str, port: int | None, root: Path | None, use_token: bool, config: Path | None, no_browser: bool) -> None:
    """Show a page that does what the commands do: choose models and a method, plan, merge, report, try, push."""
    alone = host in LOOPBACK
    if not alone and not use_token:
        _hide_token()
    from neuron_methods.support.documents import MOST_YAML, read_text
    from neuron_methods.ui.server import served

    start = read_text(config, most=MOST_YAML) if config is not None else ""
    with served(host, port, root, start, alone=alone, pushes=alone or use_token, browser=not no_browser) as address:
        say(address)
        threading.Event().wait()
