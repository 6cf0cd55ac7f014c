"""Attempts at a phase: only the latest attempt may write, all earlier ones must end.

A worker group claims the next attempt (:mod:`plad_dist.data.claims`). It also ends if a later
command has claimed the run. Late writes of an earlier attempt are harmless: a whole checkpoint is
never overwritten, and figures carry the number of their attempt.
"""

from __future__ import annotations

from dataclasses import dataclass

from plad_dist.data.claims import claim_key, encode_claim, later_claim, latest_number, read_claim, take_claim
from plad_dist.data.storage import Storage


@dataclass(frozen=True)
class Attempt:
    """Claim of one worker group on a phase.

    Attributes:
        folder: folder of the claims in the storage.
        number: number of the attempt, counted from 1.
        launch: the command that started the worker group; a command can start several.
    """

    storage: Storage
    folder: str
    number: int
    launch: str

    @property
    def name(self) -> str:
        """Name of the folders that the attempt writes."""
        return f"attempt-{self.number:05d}"

    def superseded(self) -> str | None:
        """Return the launch of a later attempt, or of a later command on the run; else None."""
        latest = latest_number(self.storage, self.folder)
        if latest > self.number:
            return str(read_claim(self.storage, self.folder, latest).get("launch", ""))
        command = later_claim(self.storage)
        return None if command is None else str(command.get("launch", ""))

    def began_at(self, step: int) -> None:
        """Record the step from which the attempt resumes."""
        self._record(step, left=False)

    def leaves(self, step: int) -> None:
        """Record that the attempt ends on request, which is no failure."""
        self._record(step, left=True)

    def failures_before(self, step: int | None) -> int:
        """Return how many attempts of this launch in a row before this one made no progress.

        Args:
            step: step from which this attempt resumes. None before the checkpoint is read; then
                only attempts that also failed before they read theirs are counted.
        """
        count = 0
        for number in range(self.number - 1, 0, -1):
            claimed = read_claim(self.storage, self.folder, number)
            if claimed.get("launch") != self.launch or claimed.get("step") not in (step, None) or claimed.get("left"):
                break
            count += 1
        return count

    def _record(self, step: int, *, left: bool) -> None:
        self.storage.replace(claim_key(self.folder, self.number), encode_claim(self.launch, step=step, left=left))


def claim(storage: Storage, folder: str, launch: str) -> Attempt:
    """Claim the next attempt, which supersedes all earlier ones."""
    claimed = take_claim(storage, folder, launch, step=None, left=False)
    return Attempt(storage, folder, claimed.number, launch)
