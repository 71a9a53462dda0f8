"""Hosts for the conformance suite of engines: one interface, in this process and in children.

An engine may run threads that no fork survives, so a real one runs in a child of its own:
`python bridge_peers.py ENGINE` (a name, or FILE:CLASS) reads commands and writes what its engine
tells it, a line of JSON each.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from shmcoord.bridge.engine import Bridge, EngineConfig, LinkState, Tls, engine


class Heard(NamedTuple):
    """What a listener was told."""

    kind: str  # "frame", "up" or "down"
    host: str
    frame: bytes
    at: float  # CLOCK_MONOTONIC, of this machine


class Peer:
    """A host that runs an engine in a child."""

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.host = config.host
        self.heard: list[Heard] = []
        self._answers: list[Any] = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, __file__, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        tls = None if config.tls is None else [str(path) for path in vars(config.tls).values()]
        self.error: str | None = self._ask({"start": {**vars(config), "tls": tls}})

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            with self._changed:
                if "answer" in said:
                    self._answers.append(said["answer"])
                else:
                    frame = base64.b64decode(said["frame"])
                    self.heard.append(Heard(said["kind"], said["host"], frame, said["at"]))
                self._changed.notify_all()

    def _tell(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def _ask(self, command: dict[str, Any], timeout_s: float = 15.0) -> Any:
        with self._changed:
            self._tell(command)
            assert self._changed.wait_for(lambda: self._answers, timeout_s), f"no answer: {command}"
            return self._answers.pop(0)

    def publish(self, *frames: bytes) -> tuple[list[bool], float]:
        """Publish frames; which were not dropped, and the longest that one took, seconds."""
        text = [base64.b64encode(frame).decode() for frame in frames]
        done, longest = self._ask({"publish": text}, 60.0)
        return done, longest

    def links(self) -> LinkState:
        """What it believes."""
        connected, dropped, detail = self._ask({"links": None})
        return LinkState(frozenset(connected), dropped, detail)

    def threads(self) -> int:
        """Python threads that live."""
        count: int = self._ask({"threads": None})
        return count

    def stop(self) -> float:
        """Stop the engine, twice; how long that took, seconds."""
        took: float = self._ask({"stop": None})
        return took

    def frames(self, host: str | None = None) -> list[bytes]:
        """The frames that came, of one host or of all."""
        return [h.frame for h in list(self.heard) if h.kind == "frame" and host in (None, h.host)]

    def hints(self, host: str) -> list[str]:
        """What it was told of a host: "up", "down"."""
        return [h.kind for h in list(self.heard) if h.kind != "frame" and h.host == host]

    def wait(self, true: Callable[[], object], what: str, timeout_s: float = 10.0) -> float:
        """Wait until something is so of what was heard; how long it took, seconds."""
        begun = time.monotonic()
        with self._changed:
            if not self._changed.wait_for(true, timeout_s):
                raise AssertionError(f"{self.host}: not within {timeout_s:g} s: {what}")
        return time.monotonic() - begun

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End its process."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            try:
                self.process.wait(10.0)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def free_port() -> int:
    """A port of this moment that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class _Teller:
    """Writes down what the engine says; also the listener of the child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def say(self, **said: Any) -> None:
        line = json.dumps(said) + "\n"
        with self._lock:
            os.write(1, line.encode())

    def on_frame(self, host: str, frame: bytes) -> None:
        text = base64.b64encode(frame).decode()
        self.say(kind="frame", host=host, frame=text, at=time.monotonic())

    def on_host(self, host: str, up: bool) -> None:
        self.say(kind="up" if up else "down", host=host, frame="", at=time.monotonic())


def _engine(name: str) -> Callable[[], Bridge]:
    file, _, class_name = name.partition(":")
    if not class_name:
        return engine(name)
    made: Callable[[], Bridge] = runpy.run_path(file)[class_name]
    return made


def _config(raw: dict[str, Any]) -> EngineConfig:
    lists = {key: tuple(raw[key]) for key in ("listen", "connect", "hosts")}
    tls = None if raw["tls"] is None else Tls(*map(Path, raw["tls"]))
    return EngineConfig(**{**raw, **lists, "tls": tls})


def _obey(bridge: Bridge, teller: _Teller, command: dict[str, Any]) -> Any:
    [(word, value)] = command.items()
    if word == "start":
        try:
            bridge.start(_config(value), teller)
        except Exception as error:  # noqa: BLE001 - it is what was asked for
            return f"{type(error).__name__}: {error}"
        return None
    if word == "publish":
        done, longest = [], 0.0
        for text in value:
            frame = base64.b64decode(text)
            begun = time.monotonic()
            done.append(bridge.publish(frame))
            longest = max(longest, time.monotonic() - begun)
        return done, longest
    if word == "links":
        links = bridge.links()
        return sorted(links.connected), links.dropped, links.detail
    if word == "threads":
        return threading.active_count()
    begun = time.monotonic()
    bridge.stop()
    bridge.stop()
    return time.monotonic() - begun


def main() -> None:
    """Be the child."""
    bridge, teller = _engine(sys.argv[1])(), _Teller()
    for line in sys.stdin:
        teller.say(answer=_obey(bridge, teller, json.loads(line)))
    bridge.stop()


if __name__ == "__main__":
    main()
