"""Chat templates: messages to the text that a model was trained on.

A template is a program that came with the model. It runs in server.text.sandbox, in whatever thread calls
`render`, and ends by itself: at 2 million steps, 2 s of CPU time, 128 Mi characters made on the way or
8 Mi characters of result, whichever comes first, it is stopped with a RequestError.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes

from server.errors import OpenError, RequestError
from server.text.budget import MAX_OUTPUT, Budget, LimitReached, spending
from server.text.messages import Traits, as_parts, plain, prepare
from server.text.sandbox import ChatEnvironment

ENVIRONMENT = ChatEnvironment()
MAX_SOURCE = 512 << 10  # characters
MARK = "<<the answer goes on here>> "  # its last character tells whether the template trims contents
PROBE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "probe", "description": "", "parameters": {}},
}
OURS = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message"))

Message = Mapping[str, object]


class ChatTemplate:
    """A compiled template. Raises OpenError, in one line, for one that does not compile.

    `special` are variables such as bos_token. Rendering is safe from several threads at once.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special = dict(special or {})
        self._compiled = compile_template(source)
        self._texts = texts_of(source)
        self.traits = Traits()
        self.traits = self._try_out()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Message] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt. `continue_final_message` ends it inside the last message, with no generation prompt.

        `extra` are variables for this template alone (enable_thinking and the like). Raises RequestError.
        """
        prepared = prepare(messages, self.traits)
        if continue_final_message:
            prepared[-1]["content"] += MARK
        variables = self._variables(extra)
        variables["messages"] = as_parts(prepared) if self.traits.parts else prepared
        variables["tools"] = None if tools is None else plain(list(tools), "tools")
        variables["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        text = self._run(variables, Budget())
        return cut_at_mark(text) if continue_final_message else text

    def _variables(self, extra: Mapping[str, object] | None) -> dict[str, Any]:
        if taken := OURS & set(extra or ()):
            name = min(taken)
            raise RequestError(
                f"{name} cannot be set as a template variable", param=f"chat_template_kwargs.{name}"
            )
        return {"documents": None, **self._special, **plain(extra or {}, "chat_template_kwargs")}

    def _run(self, variables: Mapping[str, object], budget: Budget) -> str:
        pieces: list[str] = []
        room = MAX_OUTPUT
        try:
            with spending(budget):
                for piece in self._compiled.generate(variables):
                    pieces.append(piece)
                    room -= len(piece)
                    if room < 0:
                        raise LimitReached("writes too long a prompt")
        except LimitReached as limit:
            raise RequestError(f"The model's chat template {limit}.", param="messages") from None
        except jinja2.TemplateError as error:
            reason = self._own_words(str(error))
            raise RequestError(
                f"The model's chat template refused the messages{reason}", param="messages"
            ) from None
        except Exception as error:  # noqa: BLE001 (a stranger's program: anything may be raised)
            raise RequestError(
                f"The model's chat template failed on these messages ({type(error).__name__}).",
                param="messages",
            ) from None
        return "".join(pieces)

    def _own_words(self, reason: str) -> str:
        """As much of why it refused as the template itself says; what it put together may hold a message."""
        said = [text for text in self._texts if reason.startswith(text)]
        return f": {one_line(max(said, key=len))}" if said else ""

    def _try_out(self) -> Traits:
        source = self.source
        plainly = self._shows("qprobe", [{"role": "user", "content": "qprobe"}])
        parts = [{"role": "user", "content": [{"type": "text", "text": "qprobe"}]}]
        self.variables = undeclared(source)
        as_object = self._attempt(asking({"qname": "qvalue"}))
        as_text = self._attempt(asking('{"qname": "qvalue"}'))
        printed = "qname" in as_object and "'qname'" not in as_object  # not Python's spelling of a dict
        return Traits(
            parts=not plainly and self._shows("qprobe", parts),
            text_arguments=not printed and '"qname"' in as_text,
            developer="developer" in source,
            tools="tools" in self.variables,
            calls="qvalue" in as_object + as_text + self._attempt(asking({"qname": "qvalue"}), [PROBE]),
            system=self._shows("qprobe", asking_system()),
        )

    def _shows(self, word: str, messages: list[dict[str, Any]]) -> bool:
        return word in self._attempt(messages)

    def _attempt(self, messages: list[dict[str, Any]], tools: Sequence[Message] | None = None) -> str:
        """What the template makes of these, untouched; nothing where it refuses them."""
        variables = {
            **self._variables(None),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": False,
        }
        try:
            return self._run(variables, Budget(steps=100_000, seconds=0.5))
        except RequestError:
            return ""


def compile_template(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise OpenError(f"the chat template is longer than {MAX_SOURCE} characters")
    try:
        with spending(Budget()):
            return ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise OpenError(
            f"the chat template does not compile: line {error.lineno}: {one_line(str(error.message))}"
        ) from None
    except Exception as error:  # noqa: BLE001 (a stranger's program: nested too deeply, for example)
        raise OpenError(f"the chat template does not compile ({type(error).__name__})") from None


def undeclared(source: str) -> set[str]:
    """Variables that a template reads and does not set."""
    return meta.find_undeclared_variables(ENVIRONMENT.parse(source))


def texts_of(source: str) -> frozenset[str]:
    """Texts that stand in a template's expressions."""
    constants = ENVIRONMENT.parse(source).find_all(nodes.Const)
    return frozenset(node.value for node in constants if isinstance(node.value, str) and node.value.strip())


def asking(arguments: object) -> list[dict[str, Any]]:
    call = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    return [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def asking_system() -> list[dict[str, Any]]:
    return [{"role": "system", "content": "qprobe"}, {"role": "user", "content": "probe"}]


def cut_at_mark(text: str) -> str:
    """The prompt up to the end of the last message's own text; trimmed there where the template trims."""
    place = text.rfind(MARK.rstrip())
    if place < 0:
        raise RequestError(
            "The model's chat template does not show the last message, so it cannot be continued.",
            param="messages",
        )
    return text[:place] if text.startswith(MARK, place) else text[:place].rstrip()


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:300] + "..."
