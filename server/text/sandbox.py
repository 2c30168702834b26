"""The jinja2 environment of chat templates: what templates of the Hugging Face world expect, and bounds.

Jinja's own sandbox keeps a template away from Python's internals but lets it run for ever or fill the
memory. Here every way to grow is counted against the Budget of the rendering:

- rounds of loops, calls and filters are steps (the syntax tree is rewritten to count rounds);
- `+ * ** % ~`, slices, joins, replacements and formats are charged before they are made;
- containers are walked when a literal, a call or an assignment makes one;
- `range` has at most 100,000 items (jinja's bound), and what no chat template needs but can blow up
  is missing: filters that pad, wrap or parse markup, `lipsum`, `str.center` and the like.
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from server.text.budget import current
from server.text.counting import COUNTERS, Counting
from server.text.guards import (
    check_format,
    check_join,
    check_operator,
    check_replace,
    guarded_filters,
    shown,
    textual,
)

# Of text, bytes and numbers: they make large things out of small ones.
PADDING = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"))
REWRITING = frozenset(("translate", "maketrans", "striptags", "unescape"))
GROWING_METHODS = PADDING | REWRITING


class Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # The optimizer would compute constant expressions while compiling.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, loopcontrols],
            finalize=shown,
            optimized=False,
        )
        self.filters = guarded_filters() | COUNTERS
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        tree = Counting().visit(source)
        tree.set_environment(self).set_lineno(1)
        return super()._generate(tree, *args, **kwargs)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Jinja joins by this the output of a template, macro or block."""
        kept = list(parts)
        current().chars(sum(map(len, kept)))
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in GROWING_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        method = super().wrap_str_format(value)
        return None if method is None else textual(method, partial(check_format, value.__self__))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.step()
        text = getattr(obj, "__self__", None)
        if isinstance(text, str) and obj.__name__ == "replace":
            check_replace(text, *args)
        elif isinstance(text, str) and obj.__name__ == "join":
            args = (list(*args),)
            check_join(args[0], text)
        result = super().call(context, obj, *args, **kwargs)
        budget.made(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)


def raise_exception(message: object) -> None:
    """For templates: refuse these messages. Raises TemplateError, which becomes the client's error."""
    raise TemplateError(str(message))


class TemplateDict:
    """`dict(...)` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """jinja's namespace; names with a leading underscore, which could reach Python's own, are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name that a template may use
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            refuse_private(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_private(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # jinja's prints the contents, which nobody has weighed
        return "<namespace>"


def refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace cannot hold names that begin with an underscore")
