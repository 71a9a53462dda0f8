"""A link between two bridges that can be cut without either of them being told."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Relay:
    """Forwards TCP connections from a port of its own to another, until it is cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ends: dict[socket.socket, socket.socket] = {}
        self._is_cut = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Forward nothing from here on: what is sent is as lost as in a broken cable."""
        self._is_cut = True

    def heal(self) -> None:
        """Go on."""
        self._is_cut = False

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(0.05):
                if self._is_cut:
                    threading.Event().wait(0.005)
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._forward(key.fileobj)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._target), timeout=1.0)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ends[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, one: object) -> None:
        assert isinstance(one, socket.socket)
        try:
            data = one.recv(65536)
            if data:
                self._ends[one].sendall(data)
                return
        except OSError:
            pass
        for end in (one, self._ends.get(one)):
            if end is not None and end in self._ends:
                del self._ends[end]
                with contextlib.suppress(KeyError):
                    self._selector.unregister(end)
                end.close()

    def close(self) -> None:
        """End all."""
        self._closed = True
        self._thread.join()
        for end in (*self._ends, self._listener):
            end.close()
        self._selector.close()
