"""The sockets between an engine and its ranks: one Unix stream per rank, one length and one pickle per message.

Chosen by measurement (`benchmarks/step_transport.py`) over Ray actor calls and a compiled Ray graph: it is the
fastest of the three, and the only one that hands a rank the next step while the previous one still runs. Knows
messages and bytes; not Ray, devices or what a rank does with a `Batch`.
"""

import asyncio
import contextlib
import pickle
import socket
import struct
import threading
from dataclasses import dataclass

from engine import Batch, CacheCapacity, MemoryUse, NanoserveError, RecordedStep, StepOutput

_LENGTH = struct.Struct("<Q")
_RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank's first message: who is at the other end."""

    rank: int
    pid: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of weights a rank has read, of all it will read."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Doing:
    """What a rank that is starting will be busy with for a while, for a person to read."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank cannot go on: a `ConfigError` of its start, else an `EngineDeadError`."""

    error: NanoserveError


@dataclass(frozen=True, slots=True)
class Stop:
    """The engine's last message: release the device and end."""


Report = Hello | Progress | Doing | MemoryUse | CacheCapacity | Failed | RecordedStep | StepOutput
Command = Batch | Stop


def encode(message: Report | Command) -> bytes:
    """The bytes of one message; encode once, send to every rank."""
    payload = pickle.dumps(message, protocol=5)
    return _LENGTH.pack(len(payload)) + payload


class Decoder:
    """Cuts a stream of bytes into messages. Both ends are processes of one engine, so pickle is safe."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Report | Command]:
        """The messages that `data` completes."""
        self._buffer += data
        messages: list[Report | Command] = []
        offset = 0
        while len(self._buffer) - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, offset)
            end = offset + _LENGTH.size + length
            if end > len(self._buffer):
                break
            with memoryview(self._buffer) as view:
                messages.append(pickle.loads(view[offset + _LENGTH.size : end]))
            offset = end
        if offset:
            del self._buffer[:offset]
        return messages


class RankSocket:
    """A rank's end. Blocking: a rank has nothing to do without a command. `send` may be called from any thread."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._sending = threading.Lock()
        self._decoder = Decoder()
        self._ready: list[Report | Command] = []

    def send(self, report: Report) -> None:
        """Give the engine one message; raises `OSError` when it is gone."""
        frame = encode(report)
        with self._sending:
            self._socket.sendall(frame)

    def receive(self) -> Command:
        """The next command; `Stop` when the engine is gone."""
        while not self._ready:
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                return Stop()
            self._ready = self._decoder.feed(data)
        message = self._ready.pop(0)
        assert isinstance(message, Batch | Stop), message
        return message


class RankLink:
    """The engine's end of one rank's socket. Nothing here blocks, so that a rank that hangs hangs nobody else."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._decoder = Decoder()
        self._unsent = bytearray()

    def fileno(self) -> int:
        """For selectors and event loops."""
        return self._socket.fileno()

    def receive(self) -> list[Report]:
        """What has arrived; raises `ConnectionError` when the rank is gone."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("The rank closed its socket.")
        messages = self._decoder.feed(data)
        reports = [message for message in messages if not isinstance(message, Batch | Stop)]
        assert len(reports) == len(messages), "a rank sent a command"
        return reports

    def send(self, frame: bytes, loop: asyncio.AbstractEventLoop) -> None:
        """Send an encoded command, in the background where the socket's buffer is full."""
        if self._unsent:
            self._unsent += frame
            return
        sent = self._send_some(frame)
        if sent < len(frame):
            self._unsent += frame[sent:]
            loop.add_writer(self.fileno(), self._flush, loop)

    def stop(self, frame: bytes) -> None:
        """Send a last command where that is possible at once, and the end of the stream; from any thread."""
        with contextlib.suppress(OSError):
            if not self._unsent:
                self._socket.send(frame)
            self._socket.shutdown(socket.SHUT_WR)

    def close(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Forget the socket."""
        if self.fileno() >= 0 and loop is not None and not loop.is_closed():
            loop.remove_reader(self.fileno())
            loop.remove_writer(self.fileno())
        self._socket.close()

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        del self._unsent[: self._send_some(self._unsent)]
        if not self._unsent:
            loop.remove_writer(self.fileno())

    def _send_some(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except ConnectionError:
            return len(data)  # the reader of this socket sees the same end and says so
