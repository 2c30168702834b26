"""What is written to standard error: a line an event, with its request's id, bounded, as text or as JSON.

Prompts, keys and what clients sent are logged nowhere; lines are cut all the same, since names of files and
libraries' messages have any length.
"""

import asyncio
import logging
import time
from contextvars import ContextVar

import msgspec

from server.settings import Settings

LINE_LIMIT = 2000  # bytes of a line
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def configure(settings: Settings) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines(TEXT))
    handler.addFilter(is_news)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


def is_news(record: logging.LogRecord) -> bool:
    """What a second signal cuts ends in CancelledError, as an exception or as the text of one."""
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        return False
    return not (record.name == "uvicorn.error" and record.getMessage().rstrip().endswith("CancelledError"))


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        id = request_id.get()
        return _cut(f"{text} [{id}]" if id else text)


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, request, and what `extra={"facts": ...}` gives."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(self._message(record), LINE_LIMIT // 2),
            "request": request_id.get(),
            **getattr(record, "facts", {}),
        }
        return msgspec.json.encode({key: value for key, value in line.items() if value is not None}).decode()

    def _message(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _cut(text: str, limit: int = LINE_LIMIT) -> str:
    """The end of a traceback says more than its beginning."""
    if len(text.encode("utf-8", "replace")) <= limit:
        return text
    half = limit // 2 - 8
    raw = text.encode("utf-8", "replace")
    return raw[:half].decode("utf-8", "ignore") + " [...] " + raw[-half:].decode("utf-8", "ignore")
