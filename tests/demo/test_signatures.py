"""Signatures read as source, and the call each of them allows, checked against Python's own binding of arguments."""

import ast
import inspect

import pytest

from neuron_methods.demo.signatures import MAX_SIGNATURE, library_signatures, signatures_in
from neuron_methods.support.errors import UserError

SOURCE = """
def urljoin(base, url, allow_fragments=True): ...
def everything_needed(a, b): ...
def nothing_needed(a=1, *args): ...
def keyword_needed(a, *, b): ...
def like_a_method(self, a, b=1): ...
def keyword_default(a, *, b=2): ...
def positional_only(a, /, b=1): ...
def _private(a, b=1): ...
class Reader:
    def read(self, name, pwd=None): ...
    def close(self): ...
    @staticmethod
    def build(a, b=1): ...
"""


def test_the_shortest_call_leaves_out_what_has_a_default_and_self() -> None:
    assert signatures_in(SOURCE) == [
        ("urljoin", "def urljoin(base, url, allow_fragments=True):", "urljoin(base, url)"),
        ("nothing_needed", "def nothing_needed(a=1, *args):", "nothing_needed()"),
        ("keyword_default", "def keyword_default(a, *, b=2):", "keyword_default(a)"),
        ("read", "def read(self, name, pwd=None):", "read(name)"),
    ]


def test_python_binds_every_call_of_the_library_and_none_with_an_argument_less() -> None:
    found = library_signatures()
    assert len(found) > 500
    assert len({signature for _, signature, _ in found}) == len(found)
    for name, text, call in found:
        assert len(text) <= MAX_SIGNATURE
        tree = ast.parse(f"{text} ...").body[0]
        assert isinstance(tree, ast.FunctionDef) and tree.name == name
        # Defaults and annotations name things that are not there: their values do not matter for binding.
        arguments = tree.args
        arguments.defaults = [ast.Constant(None)] * len(arguments.defaults)
        arguments.kw_defaults = [ast.Constant(None)] * len(arguments.kw_defaults)
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        namespace: dict = {}
        exec(f"def f({ast.unparse(arguments)}): ...", namespace)
        signature = inspect.signature(namespace["f"])
        given = [argument.id for argument in ast.parse(call).body[0].value.args]
        if text.startswith(f"def {name}(self"):
            given = ["self", *given]
        assert list(signature.bind(*given).arguments) == given
        if given:
            with pytest.raises(TypeError):
                signature.bind(*given[:-1])


def test_a_python_without_library_sources_is_told_so(tmp_path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("def dump(obj, fp, skipkeys=False): ...")
    with pytest.raises(UserError, match="only 1 function signatures"):
        library_signatures(tmp_path)
