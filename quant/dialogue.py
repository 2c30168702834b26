"""A question as the model's chat template puts it, in the sandbox that strangers' templates need."""

from collections.abc import Iterator, Mapping
from typing import NoReturn

TODAY = "26 Jul 2024"  # what templates that name a date are told: equal sources are to write equal texts
LONGEST = 1 << 16  # characters


class TemplateFailed(Exception):
    """The template is broken, or refuses a plain question."""


class Template:
    """Raises TemplateFailed when it is made or used. `tokens`: special tokens by the name templates use."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda _: TODAY}
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise TemplateFailed(str(error)) from error

    def ask(self, question: str) -> str:
        """The text up to where the answer begins."""
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": question}]
        try:
            pieces = self._template.generate(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._tokens
            )
            return self._joined(pieces)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise TemplateFailed(str(error)) from error

    def _joined(self, pieces: Iterator[str]) -> str:
        text = ""
        for piece in pieces:
            text += piece
            if len(text) > LONGEST:
                raise TemplateFailed("it writes too much")
        return text


def _refuse(message: object) -> NoReturn:
    raise TemplateFailed(str(message))
