"""Frames survive the trip, and what is not a frame is refused before it costs memory."""

import asyncio
import socket
import struct
import threading

import pytest

from server.process import wire
from server.types import (
    Abort,
    Command,
    Events,
    Failed,
    Generate,
    Limits,
    Loading,
    ModelText,
    Open,
    OpenFailed,
    Ready,
    Reply,
    SamplingParams,
    Shutdown,
    Status,
    Tokenize,
    Tokenized,
    TokenLogprobs,
    Tokens,
)

LIMITS = Limits(running=2, slots=4, context=64, kv_tokens=128, step_tokens=16)
TEXT = ModelText(
    pieces=(b"a", b"\xff", b""),
    control=(2,),
    chat_template=None,
    bos=None,
    eos=2,
    end_ids=(2,),
    add_bos=False,
)
COMMANDS: list[Command] = [
    Open(backend="toy-rows", variant="/v", context=None, parallel=2, options={"delay_s": "0"}),
    Generate(id="é", prompt=(1, 2), params=SamplingParams(max_tokens=3, logit_bias=((1, -2.5),)), salt="s"),
    Abort(id="x"),
    Tokenize(id="t", text="a\x00é🙂", add_special=True, parse_special=False),
    Shutdown(),
]
REPLIES: list[Reply] = [
    Loading(done=0.5),
    Ready(limits=LIMITS, backend="toy-rows", text=TEXT),
    OpenFailed(code="open_failed", message="no"),
    Status(running=3),
    Events(
        items=(
            Tokens(id="a", tokens=(1,), logprobs=(TokenLogprobs(-0.5, ((1, -0.5),)),), finish="stop"),
            Failed(id="b", code="engine_failed", message="m"),
            Tokenized(id="c", tokens=()),
        )
    ),
]


def body_of(frame: bytes) -> bytes:
    assert struct.unpack("!I", frame[:4])[0] == len(frame) - 4
    return frame[4:]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_survives_the_trip(command: Command) -> None:
    assert wire.decode_command(body_of(wire.frame(command))) == command


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_survives_the_trip(reply: Reply) -> None:
    assert wire.decode_reply(body_of(wire.frame(reply))) == reply


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", b"GET / HTTP/1.1", wire.frame(Shutdown())[4:]])
def test_what_is_no_reply_breaks_the_wire(body: bytes) -> None:
    with pytest.raises(wire.BrokenWire):
        wire.decode_reply(body)


def test_a_wrong_type_within_a_known_message_breaks_the_wire() -> None:
    body = wire.frame(Abort(id="x"))[4:].replace(b"\xa1x", b"\x01\x01"[:1])
    with pytest.raises(wire.BrokenWire):
        wire.decode_command(body)


async def reader_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


async def test_replies_are_read_until_the_end() -> None:
    reader = await reader_of(b"".join(map(wire.frame, REPLIES)))
    assert [await wire.read_reply(reader) for _ in REPLIES] == REPLIES
    assert await wire.read_reply(reader) is None


async def test_an_end_within_a_frame_is_the_end() -> None:
    whole = wire.frame(REPLIES[-1])
    for cut in (1, 4, len(whole) - 1):
        assert await wire.read_reply(await reader_of(whole[:cut])) is None


async def test_a_frame_above_the_cap_is_refused_by_its_head_alone() -> None:
    head = struct.pack("!I", wire.MAX_FRAME + 1)
    with pytest.raises(wire.BrokenWire, match="frame of"):
        await wire.read_reply(await reader_of(head))


def test_a_message_above_the_cap_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 100)
    with pytest.raises(wire.FrameTooLong):
        wire.frame(Generate(id="a", prompt=tuple(range(200)), params=SamplingParams(max_tokens=1)))


def test_a_step_too_large_for_a_frame_is_cut_and_only_the_event_too_large_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = [Tokens(id=name, tokens=(1, 2, 3)) for name in "ab"]
    large = Tokens(id="c", tokens=tuple(range(500)), finish="length")
    monkeypatch.setattr(wire, "MAX_FRAME", 150)
    frames = wire.reply_frames(Events(items=(small[0], large, small[1])))
    events: list[object] = []
    for part in frames:
        reply = wire.decode_reply(body_of(part))
        assert isinstance(reply, Events)
        events += reply.items
    assert events[0] == small[0]
    assert events[2] == small[1]
    assert isinstance(events[1], Failed)
    assert (events[1].id, events[1].code) == ("c", "engine_failed")


class Engine:
    """The engine's end with its reading thread, and the web process's end of the socket."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ends: list[str] = []
        self.wire = wire.EngineSocket(self.theirs, gone=lambda: self.ends.append("gone"))
        self.thread = threading.Thread(target=self.wire.listen)
        self.thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.theirs.close()

    def hang_up(self) -> None:
        self.ours.close()
        self.thread.join(5)
        assert not self.thread.is_alive()


def test_the_engine_gets_commands_in_order_and_then_the_end() -> None:
    with Engine() as engine:
        for command in COMMANDS:
            engine.ours.sendall(wire.frame(command))
        got = [engine.wire.take()]
        while len(got) < len(COMMANDS):
            got += engine.wire.drain(block=True)
        assert got == COMMANDS
        assert engine.wire.drain(block=False) == []
        engine.hang_up()
        assert engine.ends == ["gone"]
        assert engine.wire.drain(block=True) == [Shutdown()]


@pytest.mark.parametrize("junk", [struct.pack("!I", 2**32 - 1), wire.frame(Shutdown())[:3], b"\0\0\0\1\xc1"])
def test_junk_from_the_web_process_ends_the_engine(junk: bytes) -> None:
    with Engine() as engine:
        engine.ours.sendall(junk)
        engine.hang_up()
        assert engine.ends == ["gone"]


def test_sending_to_nobody_ends_the_engine() -> None:
    with Engine() as engine:
        engine.hang_up()
        engine.wire.send(Status())
        assert engine.ends == ["gone", "gone"]
