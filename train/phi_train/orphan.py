"""Processes that do not outlive the one that started them."""

import os
import threading
import time
from collections.abc import Callable


def when_orphaned(parent: int, act: Callable[[], None]) -> None:
    """Let a thread call `act` once this process no longer has the parent: that one was killed, and ended nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        act()

    threading.Thread(target=watch, daemon=True).start()
