"""What asks a run to end after the current step, with a checkpoint, before its last step: signals, and --max-time.

SIGTERM and SIGUSR1 are what Slurm and other schedulers send before they kill; Ctrl-C (SIGINT) asks for the same, a
second one leaves at once. Any rank may be told; all end after the same step.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPPED = 75  # exit status of a run that was asked to end (sysexits.h: temporary failure): start it again with -y 1
INTERRUPTED = 130
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Of this rank."""

    def __init__(self) -> None:
        self.reason = ""  # the name of the first signal; '' for none

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this block signals are requests. For the main thread; others hear nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            with leaving_at_second_interrupt():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name


@contextlib.contextmanager
def leaving_at_second_interrupt() -> Iterator[None]:
    """Python's handlers wait for the main thread, which may be in a kernel for minutes; a thread does not.

    With several ranks the Watch does this for all of them.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before == -1:
        threading.Thread(target=leave_at_second_interrupt, args=(reader,), daemon=True).start()
    else:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        os.close(reader)
    try:
        yield
    finally:
        if before == -1:
            signal.set_wakeup_fd(-1)
        os.close(writer)  # ends the thread


def leave_at_second_interrupt(reader: int) -> None:
    from llmc.watch import leave, say

    interrupts = 0
    while signals := os.read(reader, 64):
        interrupts += signals.count(signal.SIGINT)
        if interrupts >= 2:
            say("llmc-train", "interrupted")
            leave(INTERRUPTED)
    os.close(reader)
