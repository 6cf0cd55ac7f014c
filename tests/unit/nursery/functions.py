"""Functions that children run in the tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from plad_dist.errors import UserError
from plad_dist.nursery.child import Parent


def describe(parent: Parent, name: str, *_: str) -> dict[str, Any]:
    parent.tell("say", "started")
    return {
        "reply": parent.ask("add", 1, 2),
        "variable": os.environ.get(name),
        "parent": os.getppid(),
        "warm": "colorsys" in sys.modules,
    }


def fill_the_disk() -> None:
    raise OSError(28, "No space left on device")


def refuse(parent: Parent) -> None:
    raise UserError("prompts.jsonl: row 3: no text")


def fail(parent: Parent) -> None:
    class OfALibrary(Exception):
        pass

    raise OfALibrary("no memory")


def die(parent: Parent, number: int) -> None:
    parent.tell("say", "dying")
    os.kill(os.getpid(), number)
    time.sleep(60)


def leave(parent: Parent) -> None:
    os._exit(3)


def wait(parent: Parent) -> None:
    parent.tell("pid", os.getpid())
    time.sleep(600)


def allocate(parent: Parent, size: int) -> int:
    parent.ask("pid", os.getpid())
    return len(bytearray(b"1") * size)


def be_deaf(parent: Parent) -> None:
    """Ignore every signal that can be ignored, and run no Python code any more."""
    parent.tell("pid", os.getpid())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGSTOP)


def random_numbers(parent: Parent) -> tuple[float, float]:
    import random

    import numpy as np

    return random.random(), float(np.random.rand())
