"""Ctrl-C that lets the running step finish."""

from __future__ import annotations

import signal
import sys
import threading
import time

# A launcher forwards the signal that its processes also got from the terminal: those two are one.
_SAME_KEYPRESS_SECONDS = 1.0


class Interrupted(KeyboardInterrupt):
    """Training stopped on request; its text says where it stopped and how to go on."""


class CtrlC:
    """Within the context the first Ctrl-C prints `notice` and sets `pressed`; another one aborts as
    usual.

    Only the main thread can have it, and only where nobody else handles Ctrl-C.
    """

    def __init__(self, notice: str | None):
        self.notice, self.pressed, self._since = notice, False, 0.0

    def __enter__(self) -> CtrlC:
        self._ours = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number, frame) -> None:
        if not self.pressed:
            self.pressed, self._since = True, time.monotonic()
            if self.notice is not None:
                print(f"\n{self.notice}", file=sys.stderr, flush=True)
        elif time.monotonic() - self._since > _SAME_KEYPRESS_SECONDS:
            signal.default_int_handler(number, frame)
