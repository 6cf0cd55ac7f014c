"""Mailbox of a worker group: an actor that takes messages and passes on requests to yield.

Workers and Ray Train's controller post messages; a thread of the driver reads them every second.
The controller asks a group to yield before a resize; the workers poll that request and confirm it.
A worker whose training process has died asks all workers to restart theirs. The mailbox also keeps
the history of the worker groups, because it outlives every controller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from plad_dist.progress import Progress
from plad_dist.timeline import Activity, parts_text
from plad_dist.training.driver.growth import Outlook
from plad_dist.training.driver.history import RunHistory
from plad_dist.training.driver.metrics import TrainingMetrics
from plad_dist.training.driver.process_restarts import ProcessRestarts
from plad_dist.training.messages import Began, Enters, HeldoutRanked, Message, Said, Started, StepDone

logger = logging.getLogger("plad")

_MOST_WARM_STARTS = 2  # in a row that fail before the first step
_MOST_CALLS = 100_000  # at a time; one for each worker waits


class ProgressMailbox:
    """State of the mailbox actor.

    Worker groups are numbered, so that a late reply to an earlier one is ignored.

    Args:
        last_phase: name of the last phase; the time left is known only in it.
        max_restarts: the most restarts of training processes; -1 for no limit.
    """

    def __init__(self, last_phase: str, max_restarts: int) -> None:
        self._messages: list[Message] = []
        self._group = self._asked_group = self._yielded_group = self._workers = 0
        self._last_phase = self._phase = last_phase
        self._phase_steps: dict[str, int] = {}
        self._history = RunHistory()
        self._restarts = ProcessRestarts(max_restarts)

    def post(self, message: Message, restarts: int | None = None) -> None:
        """Add a message for the driver.

        Args:
            restarts: restarts that its training process knows of. A step from before the latest one
                is repeated and does not count. None if the message is not from such a process.
        """
        if isinstance(message, StepDone) and restarts not in (None, self._restarts.count):
            return
        self._messages.append(message)
        match message:
            case Began():
                self._phase = message.phase
                self._phase_steps[message.phase] = message.steps
            case StepDone():
                steps = self._phase_steps.get(message.phase) if message.phase == self._last_phase else None
                left = None if steps is None else steps - message.step
                self._history = self._history.steps(time.monotonic(), message.figures["seconds"], left)

    def drain(self) -> list[Message]:
        """Return and remove all messages."""
        messages, self._messages = self._messages, []
        return messages

    def new_group(self, workers: int) -> None:
        """Record that another worker group is about to start."""
        self._group += 1
        self._asked_group, self._workers = 0, workers
        self._start()
        self._restarts.new_group(self._group)

    def disrupted(self) -> None:
        """Record that the present group ended by a failure or because a node left."""
        self._history = self._history.ends(time.monotonic(), is_disrupted=True)

    def present_group(self) -> int:
        """Return the number of the present group."""
        return self._group

    def restart_processes(self, group: int, count: int, reason: str) -> bool:
        """Ask all workers to restart their training processes: see :meth:`ProcessRestarts.request`.

        Args:
            reason: reported to the driver.
        """
        before = self._restarts.count
        may_restart = self._restarts.request(group, count, takes_steps=self.takes_steps())
        if self._restarts.count > before:
            self.disrupted()
            self._messages.append(Enters(Activity.STARTING))
            self._messages.append(Said(self._phase, f"{reason}; the training processes are restarted"))
            self._start()
        return may_restart

    def _start(self) -> None:
        self._history = self._history.starts(time.monotonic(), self._workers)
        if self._history.failed_starts() == _MOST_WARM_STARTS:
            text = f"starts without nurseries, since {_MOST_WARM_STARTS} starts have failed"
            self._messages.append(Said(self._phase, text))

    def may_start_warm(self) -> bool:
        """Return False after several failed starts, because the nurseries may be their cause."""
        return self._history.failed_starts() < _MOST_WARM_STARTS

    async def meet(self, group: int, group_id: str, address: str | None) -> tuple[str, int] | None:
        """Exchange the address of the first worker: see :meth:`ProcessRestarts.meet`."""
        return await self._restarts.meet(group, group_id, address)

    async def processes_restart(self, group: int, count: int) -> int | None:
        """Wait for a restart: see :meth:`ProcessRestarts.wait`."""
        return await self._restarts.wait(group, count)

    def finish(self, group: int, count: int) -> bool:
        """Record that a worker has finished: see :meth:`ProcessRestarts.finish`."""
        return self._restarts.finish(group, count)

    def takes_steps(self) -> bool:
        """Return True if the present group has taken a step."""
        return self._history.takes_steps()

    def outlook(self) -> Outlook:
        """Return what the present group can expect."""
        return self._history.outlook(time.monotonic())

    def ask_to_yield(self) -> None:
        """Ask the present group to yield."""
        self._asked_group = self._group

    def wants_yield(self) -> int:
        """Return the number of the group that is asked to yield, 0 for none."""
        return self._asked_group

    def yielded(self, group: int) -> None:
        """Record that a group has committed a checkpoint and waits."""
        self._yielded_group = group

    def has_yielded(self) -> bool:
        """Return True if the present group has yielded."""
        return self._yielded_group == self._group


def reply_to(call: Any) -> Any:
    """Return the mailbox's reply to a call, or None if it fails or takes more than 10 s.

    Failures are not reported, because training does not depend on the mailbox.

    Args:
        call: Ray's reference of the reply.
    """
    try:
        return ray.get(call, timeout=10)
    except ray.exceptions.RayError:
        return None


@contextmanager
def open_mailbox(progress: Progress, last_phase: str, max_restarts: int) -> Iterator[Any]:
    """Yield a mailbox actor. Show its messages and export them as metrics while the block runs.

    Args:
        last_phase, max_restarts: see :class:`ProgressMailbox`.
    """
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class = ray.remote(ProgressMailbox).options(
        num_cpus=0, scheduling_strategy=this_node, max_concurrency=_MOST_CALLS
    )
    mailbox = actor_class.remote(last_phase, max_restarts)
    reader = _MailboxReader(mailbox, progress)
    thread = threading.Thread(target=reader.follow, daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        reader.finished.set()
        thread.join(timeout=5)
        reader.read()
        ray.kill(mailbox)


class _MailboxReader:
    """Shows the messages of a mailbox in the progress output, and exports them as metrics.

    The driver runs :meth:`follow` in a thread until `finished` is set.
    """

    def __init__(self, mailbox: Any, progress: Progress) -> None:
        self._mailbox, self._progress = mailbox, progress
        self._metrics = TrainingMetrics()
        self.finished = threading.Event()

    def follow(self) -> None:
        """Read every second."""
        while not self.finished.wait(1.0):
            self.read()

    def read(self) -> None:
        """Show the new messages.

        Training does not depend on them, so a failure is logged and not raised.
        """
        try:
            for message in ray.get(self._mailbox.drain.remote(), timeout=30):
                _show(self._progress, message)
                self._metrics.record(message)
            self._metrics.refresh()
        except ray.exceptions.GetTimeoutError:
            return  # the node is busy, mostly with starting workers
        except Exception as error:  # noqa: BLE001 - progress is not needed for training
            logger.warning("messages of the workers cannot be read: %s", error)


def _show(progress: Progress, message: Message) -> None:
    stage = f"train {getattr(message, 'phase', '')}"
    match message:
        case Began():
            progress.say(f"{stage}: {message.text}")
            progress.start(stage, message.steps, "steps")
        case Said():
            progress.say(f"{stage}: {message.text}")
        case HeldoutRanked():
            progress.say(
                f"{stage}: step {message.step}: {message.pair_accuracy:.1%} of the held-out pairs ranked correctly"
            )
        case Enters():
            progress.enter(message.activity)
        case Started():
            progress.say(f"{stage}: started in {parts_text(message.parts)}")
        case StepDone():
            progress.enter(Activity.COMPUTING)
            progress.set(message.step, message.tokens, f"loss {message.figures['loss']:.3f}")
