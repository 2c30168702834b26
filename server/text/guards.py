"""Filters and operators of chat templates that charge the Budget for what they make, before they make it."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from jinja2.filters import FILTERS, do_join
from jinja2.nodes import EvalContext
from jinja2.utils import pass_eval_context

from server.text.budget import LimitReached, current

ITEM_CHARS = 8  # what an item of a list takes
MAX_BITS = 4096  # of an integer
MAX_WIDTH = 100  # of an indentation or a rounded fraction
WIDE_FORMAT = re.compile(
    r"\d{4}|%[^a-zA-Z%]*\*|\{[^{}]*\{"
)  # a width of 4 digits, or one taken from an argument


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes no text: a step, longer for long inputs."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.step(1 + sum(len(arg) for arg in args if isinstance(arg, list | str)) // 64)
        result = function(*args, **kwargs)
        budget.made(result)
        return result

    return guarded


def textual(function: Callable[..., Any], before: Callable[..., None] | None = None) -> Callable[..., Any]:
    """A filter that prints what it is given; `before` refuses or charges what grows more than that."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.step()
        budget.chars(sum(budget.weigh(arg) for arg in (*args[skip:], *kwargs.values())))
        if before is not None:
            before(*args[skip:], **kwargs)
        return function(*args, **kwargs)

    return guarded


def shown(value: object) -> object:
    """Every expression that the template prints."""
    if not isinstance(value, str):
        budget = current()
        budget.chars(budget.weigh(value))
    return value


def check_replace(text: object, old: object, new: object, *_: object, **__: object) -> None:
    whole, part = str(text), str(old)
    current().chars(len(whole) + whole.count(part) * len(str(new)))


def check_join(parts: list[object], by: object = "", *_: object, **__: object) -> None:
    budget = current()
    budget.chars(len(parts) * len(str(by)) + budget.weigh(parts))


@pass_eval_context
def join(eval_ctx: EvalContext, parts: Iterable[object], *args: Any, **kwargs: Any) -> str:
    """jinja's filter, over parts that can be counted first."""
    kept = list(parts)
    check_join(kept, *args, **kwargs)
    result: str = do_join(eval_ctx, kept, *args, **kwargs)
    return result


def check_indent(text: str, width: int | str = 4, *_: object, **__: object) -> None:
    size = len(width) if isinstance(width, str) else width
    if size > MAX_WIDTH:
        raise LimitReached("indents too far")
    current().chars(size * str(text).count("\n"))


def check_round(_value: object, precision: int = 0, *_: object, **__: object) -> None:
    if abs(precision) > MAX_WIDTH:
        raise LimitReached("rounds to too many digits")


def check_format(text: object, *args: object, **kwargs: object) -> None:
    template, budget = str(text), current()
    if WIDE_FORMAT.search(template):
        raise LimitReached("formats too wide")
    fields = template.count("{") + template.count("%")  # each may print any argument
    budget.chars(len(template) + fields * sum(budget.weigh(arg) for arg in (*args, *kwargs.values())))


BEFORE: Mapping[str, Callable[..., None]] = {
    "replace": check_replace,
    "indent": check_indent,
    "format": check_format,
    "round": check_round,
}


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Charge a binary operation whose result may be larger than its operands."""
    match operator, left, right:
        case ("+", str(), str()):
            current().chars(len(left) + len(right))
        case ("+", list() | tuple(), list() | tuple()):
            current().chars(ITEM_CHARS * (len(left) + len(right)))
        case ("*", str() | list() | tuple() | bytes(), int()):
            current().chars(ITEM_CHARS * len(left) * max(right, 0))
        case ("*", int(), str() | list() | tuple() | bytes()):
            current().chars(ITEM_CHARS * len(right) * max(left, 0))
        case ("*", int(), int()) if left.bit_length() + right.bit_length() > MAX_BITS:
            raise LimitReached("computes too large a number")
        case ("**", int(), int()) if left.bit_length() * right > MAX_BITS:
            raise LimitReached("computes too large a number")
        case ("%", str(), _):
            check_format(left, right)


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as a model reads it: no HTML escapes, no escaped letters."""
    if isinstance(indent, int) and indent > MAX_WIDTH:
        raise LimitReached("indents too far")
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    current().chars(len(text))
    return text


# Not among them: what pads, wraps or parses markup, and sum, which adds lists in square time.
PLAIN = """abs attr count d default dictsort first float groupby int items last length list map max min reject
    rejectattr reverse select selectattr sort unique"""
TEXTUAL = """capitalize e escape format indent lower replace round safe string title trim truncate upper
    wordcount"""


def guarded_filters() -> dict[str, Callable[..., Any]]:
    """Every filter that a chat template may use, by name."""
    table = {name: plain(FILTERS[name]) for name in PLAIN.split()}
    table |= {name: textual(FILTERS[name], BEFORE.get(name)) for name in TEXTUAL.split()}
    return table | {"join": textual(join), "tojson": textual(tojson)}
