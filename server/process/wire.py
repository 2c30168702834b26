"""Frames between the web process and an engine: 4 bytes of length, then one msgpack struct.

Only the closed unions Command and Reply can be decoded, so a frame can carry data and nothing else. A frame
that is too long or does not decode breaks the connection for good: there is no way to find the next frame.
"""

import asyncio
import queue
import socket
import struct
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from server.types import Command, Events, Failed, Reply, Shutdown

MAX_FRAME = 64 * 1024**2  # bytes; 20 logprobs at each of 131,072 prompt positions are about 40 MB

_HEAD = struct.Struct("!I")
_ENCODE = msgspec.msgpack.Encoder().encode
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class BrokenWire(Exception):
    """The other side sent something that is not a frame, or ended within one."""


class FrameTooLong(ValueError):
    """The message does not fit into a frame."""


def frame(message: Command | Reply) -> bytes:
    """Raises FrameTooLong."""
    body = _ENCODE(message)
    if len(body) > MAX_FRAME:
        raise FrameTooLong(f"{len(body)} bytes where {MAX_FRAME} are allowed")
    return _HEAD.pack(len(body)) + body


def reply_frames(reply: Reply) -> list[bytes]:
    """One frame where it fits, else one for each event; an event too large fails its own request only."""
    try:
        return [frame(reply)]
    except FrameTooLong:
        if not isinstance(reply, Events):
            raise
    if len(reply.items) > 1:
        return [part for item in reply.items for part in reply_frames(Events(items=(item,)))]
    failed = Failed(id=reply.items[0].id, code="engine_failed", message="the answer is too large to be sent")
    return [frame(Events(items=(failed,)))]


def decode_command(body: bytes) -> Command:
    """Raises BrokenWire."""
    try:
        return _COMMANDS.decode(body)
    except msgspec.DecodeError as error:
        raise BrokenWire(f"unreadable command: {error}") from None


def decode_reply(body: bytes) -> Reply:
    """Raises BrokenWire."""
    try:
        return _REPLIES.decode(body)
    except msgspec.DecodeError as error:
        raise BrokenWire(f"unreadable reply: {error}") from None


def _length(head: bytes) -> int:
    size: int = _HEAD.unpack(head)[0]
    if size > MAX_FRAME:
        raise BrokenWire(f"a frame of {size} bytes where {MAX_FRAME} are allowed")
    return size


async def read_reply(reader: asyncio.StreamReader) -> Reply | None:
    """The next reply, or None at the end of the stream. Raises BrokenWire."""
    try:
        size = _length(await reader.readexactly(_HEAD.size))
        return decode_reply(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None  # an engine that was killed within a frame is as gone as any other


class EngineSocket:
    """The engine's end: commands are read by a thread of their own, so a forward pass never delays an abort.

    `gone` is called, from either thread, when the web process has closed its end or sends what is no command.
    """

    def __init__(self, sock: socket.socket, gone: Callable[[], None]) -> None:
        self._sock = sock
        self._gone = gone
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def send(self, reply: Reply) -> None:
        """Blocks while the web process does not read."""
        try:
            for part in reply_frames(reply):
                self._sock.sendall(part)
        except ConnectionError:
            self._gone()

    def drain(self, block: bool) -> list[Command]:
        """Commands that have arrived, in order; with `block` at least one."""
        commands = [self._commands.get()] if block else []
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def take(self) -> Command:
        """Wait for one command."""
        return self._commands.get()

    def listen(self) -> None:
        """Read until the connection ends: the body of the reading thread."""
        try:
            with self._sock.makefile("rb") as stream:
                while (body := _read_frame(stream)) is not None:
                    self._commands.put(decode_command(body))
        except (BrokenWire, ConnectionError):
            pass  # the same end: nothing that follows could be understood
        self._commands.put(Shutdown())
        self._gone()


def _read_frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(_HEAD.size)
    if not head:
        return None
    if len(head) < _HEAD.size:
        raise BrokenWire("the stream ended within a head")
    body = stream.read(size := _length(head))
    if len(body) < size:
        raise BrokenWire("the stream ended within a frame")
    return body
