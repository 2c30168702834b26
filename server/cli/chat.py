"""`quantserve chat`: talk to a running server from a terminal."""

import os
import sys
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.terminal import stop

if TYPE_CHECKING:
    from server.cli.client import ChatClient, Message

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    model: Annotated[str | None, typer.Argument(help="model or model:variant [the server's first]")] = None,
    url: Annotated[str | None, typer.Option(help="The server.", metavar="URL")] = None,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer.", metavar="N", min=1)
    ] = None,
) -> None:
    """Chat with a running server. An API key is taken from QUANTSERVE_API_KEY; input may also be piped in."""
    from server.cli.client import ChatClient, Unreachable

    client = ChatClient(url or local_url(), os.environ.get("QUANTSERVE_API_KEY"), max_tokens)
    try:
        name = model or client.first_model()
        talk(client, name, system)
    except Unreachable as error:
        stop(str(error))


def local_url() -> str:
    from server.settings import read_settings

    return f"http://127.0.0.1:{read_settings(os.environ, ('port',)).port}"


def talk(client: "ChatClient", model: str, system: str | None) -> None:
    """Messages from stdin, answers to stdout; everything else to stderr. Raises Unreachable."""
    from server.cli.client import Message, Refused

    opening = [Message("system", system)] if system else []
    history = list(opening)
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() editing and a history
    _note(f"{model} at {client.url}. {HELP}")
    while (text := _ask()) is not None:
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            history = list(opening)
            continue
        asked = [*history, Message("user", text)]
        try:
            answer = _print_answer(client, model, asked)
        except Refused as error:
            if not sys.stdin.isatty():
                stop(str(error))
            _note(str(error))
            continue
        history = [*asked, Message("assistant", answer)]


def _ask() -> str | None:
    """The next message that is not blank; None at the end."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            _note("")
            return None
        if text:
            return text


def _print_answer(client: "ChatClient", model: str, messages: "list[Message]") -> str:
    """Prints as it comes; Ctrl-C keeps what has come. Raises Refused, Unreachable."""
    pieces: list[str] = []
    answer = client.answer(model, messages)
    try:
        for piece in answer:
            pieces.append(piece)
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        _note(" (stopped)")
    finally:
        answer.close()
    sys.stdout.write("\n")
    return "".join(pieces)


def visible(text: str) -> str:
    """Without control characters, with which a model could steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def _note(text: str) -> None:
    if sys.stdin.isatty():
        sys.stderr.write(text + "\n")
