"""Ctrl-C, and the SIGTERM of a scheduler or launcher: finish the step, save, stop."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from molora import processes

__all__ = ["SaveOnInterrupt"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 3.0  # seconds; a launcher sends several signals at once, a person who means it presses again later
log = logging.getLogger(__name__)


class SaveOnInterrupt(TrainerCallback):
    """Asks for a checkpoint and the end of training at the next whole step, in all processes at the same one.

    A second Ctrl-C some seconds later interrupts at once, as ever.
    """

    def __init__(self) -> None:
        self.asked: float | None = None
        self._before: dict[int, Any] = {}

    @property
    def interrupted(self) -> bool:
        """Whether training ended because somebody asked."""
        return self.asked is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT and time.monotonic() - self.asked > AGAIN:
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = time.monotonic()
            log.warning("%s: finishing this step and saving a checkpoint", signal.Signals(number).name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals; only the main thread of a program can."""
        self.asked = None
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop together: a process that stopped alone would leave the others waiting."""
        if processes.anywhere(self.interrupted, args.device):
            self.asked = self.asked or time.monotonic()
            control.should_save = control.should_training_stop = True
        return control

    def restore(self) -> None:
        """Give the signals back."""
        for s, handler in self._before.items():
            if handler is not None:  # one that was not set from Python cannot be
                signal.signal(s, handler)
        self._before = {}
