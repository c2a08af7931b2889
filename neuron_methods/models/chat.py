"""Conversations as text, by the chat template of a tokenizer.

A template comes with a model, and is a program: it may go on for ever, or ask for memory without end. So transformers
renders it in a process of its own, which has an end to both; nothing within this process could end a computation in C.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from neuron_methods.support.errors import UserError
from neuron_methods.support.text import format_bytes, one_line

#: An end to one conversation's rendering; of the process as a whole to its memory.
SECONDS = 10.0
MEMORY = 2 << 30
#: Characters of one conversation as text.
LONGEST = 1 << 24
_TO_BEGIN = 120.0  # seconds

# One request a line, one answer a line. The alarm ends a rendering whose parent is gone.
_RENDERER = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
out, sys.stdout = sys.stdout, sys.stderr
import signal
from transformers.utils.chat_template_utils import render_jinja_template
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
except (ImportError, ValueError, OSError):
    pass
print(json.dumps("ready"), file=out, flush=True)
for line in sys.stdin:
    getattr(signal, "alarm", int)({int(SECONDS) + 5})
    try:
        (text,), _ = render_jinja_template(**json.loads(line))
        found = {{"text": text}} if len(text) <= {LONGEST} else {{"length": len(text)}}
    except Exception as error:
        found = {{"error": type(error).__name__, "words": str(error)[:2000]}}
    getattr(signal, "alarm", int)(0)
    print(json.dumps(found), file=out, flush=True)
"""


class _Renderer:
    """The process that renders; begun when it is first needed, and again when it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Have one conversation rendered; None where it was ended, by its time or its memory."""
        with self._lock:
            process = self._begun()
            found = self._answer(process, json.dumps(request, default=str) + "\n", SECONDS)
            if found is None:
                self._end()
            return found

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _begun(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._owner = os.getpid()  # one that was forked off does not share it
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _RENDERER, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            if self._answer(self._process, "", _TO_BEGIN) != "ready":
                self._end()
                raise RuntimeError("the process that renders chat templates did not begin")
        return self._process

    def _answer(self, process: subprocess.Popen[str], line: str, seconds: float) -> Any:
        end = threading.Timer(seconds, process.kill)
        end.daemon = True
        end.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(line)
            process.stdin.flush()
            return json.loads(process.stdout.readline() or "null")
        except (BrokenPipeError, ValueError):  # it has ended, perhaps within an answer
            return None
        except BaseException:
            process.kill()  # what it says next would be the answer to this
            raise
        finally:
            end.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError, AttributeError):
                    stream.close()
            process.wait()


_renderer = _Renderer()
atexit.register(_renderer.close)


def rendered(tokenizer: Any, conversation: Sequence[dict[str, str]], where: str, **options: Any) -> str:
    """Write a conversation up to where the model's next turn begins; the template writes special tokens itself.

    Args:
        tokenizer: of transformers.
        conversation: turns with `role` and `content`.
        where: for the message.
        **options: of `apply_chat_template`, and what else the template reads.

    Raises:
        UserError: with what the template says, which may not know a role; it takes too long, or too much memory.
    """
    what = f"{where}: its chat template cannot be followed"
    asked = {"add_generation_prompt": True, **tokenizer.special_tokens_map, **options}
    template = asked.pop("chat_template", None)
    if not isinstance(template, str):
        try:
            template = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise UserError(f"{what}: {one_line(error)}") from None
    found = _renderer.ask({**asked, "chat_template": template, "conversations": [list(conversation)]})
    if found is None:
        limits = f"{SECONDS:.0f} s or {format_bytes(MEMORY)} of memory"
        raise UserError(f"{what}: it took more than {limits} for one conversation")
    if "length" in found:
        raise UserError(f"{what}: it makes {found['length']} characters of one conversation")
    if "error" in found:
        kind = "" if found["error"] in ("OSError", "ValueError") else f"{found['error']}: "
        words = " ".join(found["words"].split())[:500]
        raise UserError(f"{what}: {kind}{''.join(c if c.isprintable() else '?' for c in words)}")
    return found["text"]
