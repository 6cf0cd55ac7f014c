"""What is known of a phase's checkpoints from answers that were sampled from them while training went on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed


@dataclass(frozen=True)
class CheckpointProbe:
    """Figures of the answers of one checkpoint, or of the starting student, to a few held-out prompts.

    Attributes:
        tokens: mean length of an answer.
        end_share: share of answers that end with an end-of-sequence token or a stop string.
        repetition: mean share of repeated word 3-grams.
        win_rate: against the starting student's answers by ROUGE-L, ties counted half; None without references.
    """

    step: int
    tokens: float
    end_share: float
    repetition: float
    win_rate: float | None = None


@dataclass(frozen=True)
class CollapseRecord:
    """What watching has found so far. The driver writes it, the trainer's first rank reads it.

    Attributes:
        fingerprint: of the phase; what was found of another one does not count.
        start: the starting student.
        looks: at checkpoints, in the order of their steps.
        looking: step of the checkpoint that is being sampled.
        sound: step of the latest checkpoint that is there and had not collapsed.
        collapse: what is wrong with the latest one that was looked at, None for nothing.
    """

    fingerprint: str
    start: CheckpointProbe
    looks: list[CheckpointProbe] = field(default_factory=list)
    looking: int | None = None
    sound: int | None = None
    collapse: str | None = None

    @property
    def needed(self) -> set[int]:
        """Steps whose checkpoints must not be pruned."""
        return {step for step in (self.looking, self.sound) if step is not None}

    def write(self, storage: Storage, phase: str) -> None:
        storage.replace(_key(phase), json.dumps(asdict(self), indent=1).encode())


def read_collapse_record(storage: Storage, phase: str, fingerprint: str | None) -> CollapseRecord | None:
    """What watching has found of a phase; None where it is not watched, or this was another one.

    Args:
        fingerprint: of the phase, None for any.

    Raises:
        RunFailed: it cannot be read.
    """
    found = storage.read_json(_key(phase))
    if found is None:
        return None
    try:
        looks = {
            "start": CheckpointProbe(**found["start"]),
            "looks": [CheckpointProbe(**look) for look in found["looks"]],
        }
        watched = CollapseRecord(**{one.name: found[one.name] for one in fields(CollapseRecord)} | looks)
    except (KeyError, TypeError, AttributeError):
        raise RunFailed(
            f"{storage.url}/{_key(phase)}: damaged; delete it to have the checkpoints looked at anew"
        ) from None
    return watched if fingerprint in (None, watched.fingerprint) else None


def _key(phase: str) -> str:
    return f"events/{phase}/watched.json"
