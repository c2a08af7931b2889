"""The regular expressions of an adapter's config, tried with a time limit before peft or we match with them.

One that backtracks for ever holds up a whole program: nothing stops Python's `re` from within. So those that are more
than plain names are matched in a process on its own against the names that they will be matched against.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from neuron_methods.adapters.config import CONFIG_NAME, AdapterConfig
from neuron_methods.support.errors import UserError
from neuron_methods.support.text import shortened

_SECONDS = 10
_PLAIN = re.compile(r"[\w.\-]*")
# A name that does not match is what takes longest, so each is tried with something behind it, too.
_WORKER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    try:
        compiled = re.compile(pattern)
    except Exception as error:
        print(json.dumps(str(error)))
        break
    for name in names:
        compiled.match(name)
        compiled.match(name + "!")
"""


def check_patterns(config: AdapterConfig, names: Iterable[str]) -> None:
    """Make sure that an adapter's regular expressions are some, and match in good time.

    Args:
        config: of the adapter.
        names: of the base's modules.

    Raises:
        UserError: naming the key and the expression.
    """
    wanted = [(key, given, used) for key, given, used in _patterns(config) if not _PLAIN.fullmatch(given)]
    if not wanted:
        return
    given = json.dumps([[used for _, _, used in wanted], list(names)])
    try:
        worker = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _WORKER], input=given, capture_output=True, text=True, timeout=_SECONDS
        )
        said, problem = worker.stdout.split("\n"), "it takes more memory than there is"
    except subprocess.TimeoutExpired as error:
        said, problem = (error.stdout or b"").decode().split("\n"), f"it matches no name within {_SECONDS} seconds"
    else:
        if worker.returncode == 0:
            if not said[-2].startswith('"'):
                return
            problem = f"no regular expression ({json.loads(said[-2])})"
    number = next((int(line) for line in reversed(said) if line.isdigit()), 0)
    key, expression, _ = wanted[number]
    raise UserError(
        f"{config.where}: {CONFIG_NAME}: {key}: {shortened(expression)}: {problem}; name the modules plainly there"
    )


def _patterns(config: AdapterConfig) -> Iterator[tuple[str, str, str]]:
    """(key, expression as it is given, as peft 0.21 and we match it)."""
    raw = config.raw
    for key in ("target_modules", "exclude_modules"):
        if isinstance(raw.get(key), str):
            yield key, raw[key], f"(?:{raw[key]})\\Z"
    for name in raw.get("modules_to_save") or ():
        yield "modules_to_save", name, rf"(^|.*\.){name}($|\..*)"
    layers = raw.get("layers_pattern") or ()
    for name in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."
    for key in ("rank_pattern", "alpha_pattern"):
        for name in raw.get(key) or ():
            yield key, name, rf"(.*\.)?({name})$"
