"""The server of the page: on loopback unless asked otherwise, without anything that tells others of it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuron_methods.support.errors import UserError
from neuron_methods.ui.jobs import Desk
from neuron_methods.ui.places import Root
from neuron_methods.ui.showing import STYLE

PORTS = range(7860, 7960)
_OWN_NAMES = ["127.0.0.1", "localhost", "[::1]"]
_MOST_UPLOAD = "20mb"


@contextmanager
def served(
    host: str,
    port: int | None,
    root: Path | None,
    start: str = "",
    *,
    alone: bool = True,
    pushes: bool = True,
    browser: bool = False,
) -> Iterator[str]:
    """Serve the page as long as the block lasts, and give its address; the directory of the page becomes the current.

    Args:
        host: to listen at.
        port: to listen at; None: the first free one of `PORTS`.
        root: the directory that paths start from, and outside of which nothing is read; None: the current one, and
            paths may lead anywhere.
        start: YAML that the page begins with.
        alone: whether this machine alone can reach the host.
        pushes: whether what is merged may be uploaded from there.
        browser: open one.

    Raises:
        UserError: Gradio is missing, the port is taken, or no directory is named where others may reach the page.
    """
    if root is None and not alone:
        raise UserError(
            f"--host {host}: others can reach the page there; name the one directory they may use: --root DIR"
        )
    if root is not None and not root.is_dir():
        raise UserError(f"--root {root}: no such directory")
    place = Path(os.path.realpath(root or Path.cwd()))
    port = _free_port(host, port)
    for name, value in (("GRADIO_ANALYTICS_ENABLED", "False"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
        os.environ.setdefault(name, value)  # whoever has asked for it, has it
    try:
        import gradio as gr
    except ImportError:
        raise UserError("the page needs Gradio: pip install 'mergekit-neuron[ui]'") from None
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from neuron_methods.ui.page import Page

    os.chdir(place)
    desk = Desk()
    blocks = Page(Root(place, root is not None), desk, alone, start, pushes).build()
    # A page of somebody else's, whose name is made to lead here, is none of ours.
    guard = [Middleware(TrustedHostMiddleware, allowed_hosts=_OWN_NAMES)] if alone else []
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=["settings"],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            max_file_size=_MOST_UPLOAD,
            app_kwargs={"middleware": guard, "docs_url": None, "redoc_url": None},
            theme=gr.themes.Default(
                primary_hue="indigo",
                secondary_hue="indigo",
                neutral_hue="slate",
                font=["system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ),
            css=STYLE,
        )
        yield address
    finally:
        desk.close()
        if (server := getattr(blocks, "server", None)) is not None:
            server.force_exit = True  # browsers keep their connections open
            # uvicorn 0.54 shows a traceback for every connection that this cuts off.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        blocks.close(verbose=False)


def _free_port(host: str, port: int | None) -> int:
    for candidate in PORTS if port is None else (port,):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                problem = error
                continue
        return candidate
    where = f"port {port}" if port is not None else f"ports {PORTS.start} to {PORTS.stop - 1}"
    raise UserError(f"{host}: cannot listen at {where} ({problem.strerror}); choose another: --port N")
