"""Record of the collapse watch: probes of checkpoints, and the verdict on them.

It is stored in ``events/<phase>/collapse.json``.

The driver probes checkpoints while a round trains, judges the figures and writes the record. The
first rank of the trainer reads it when it prunes checkpoints: it keeps the ones that the record
needs, and ends training at a collapse.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.untrusted import strict_json


@dataclass(frozen=True)
class CheckpointProbe:
    """Figures of a checkpoint's, or the starting student's, responses to a few held-out prompts.

    Attributes:
        step: step of the checkpoint; 0 for the starting student.
        tokens: mean length of a response.
        end_share: share of responses that end with an end-of-sequence token or a stop string.
        repetition: mean share of repeated word 3-grams.
        win_rate: share of wins against the starting student's responses by ROUGE-L, ties counted
            half; None without references.
    """

    step: int
    tokens: float
    end_share: float
    repetition: float
    win_rate: float | None = None


@dataclass(frozen=True)
class CollapseRecord:
    """Probes of a phase and the verdict on them.

    Attributes:
        fingerprint: fingerprint of the phase; records of another phase are ignored.
        start: figures of the starting student.
        probes: probes of checkpoints, in the order of their steps.
        probing: step of the checkpoint that is being probed, or None.
        sound: step of the latest checkpoint that exists and has not collapsed, or None.
        collapse: the bound that the latest probed checkpoint violates, in words; None if it is
            sound.
    """

    fingerprint: str
    start: CheckpointProbe
    probes: list[CheckpointProbe] = field(default_factory=list)
    probing: int | None = None
    sound: int | None = None
    collapse: str | None = None

    @property
    def needed(self) -> set[int]:
        """Steps whose checkpoints must not be pruned."""
        return {step for step in (self.probing, self.sound) if step is not None}

    def write(self, storage: Storage, phase: str) -> None:
        """Write the record of a phase, atomically, in place of any earlier one."""
        storage.replace(_key(phase), strict_json(asdict(self)).encode())


def read_collapse_record(storage: Storage, phase: str, fingerprint: str | None) -> CollapseRecord | None:
    """Return the record of a phase, or None if there is none or it belongs to another fingerprint.

    Args:
        fingerprint: fingerprint of the phase; None accepts any.

    Raises:
        RunFailed: the record is damaged, or the storage does not answer.
    """
    document = storage.read_json(_key(phase))
    if document is None:
        return None
    try:
        probes = {
            "start": _probe(document["start"]),
            "probes": [_probe(probe) for probe in document["probes"]],
        }
        values = {attribute.name: document[attribute.name] for attribute in fields(CollapseRecord)}
        record = CollapseRecord(**values | probes)
    except (KeyError, TypeError, AttributeError):
        raise RunFailed(f"{storage.url}/{_key(phase)}: damaged; delete it to probe the checkpoints again") from None
    return record if fingerprint in (None, record.fingerprint) else None


def _probe(figures: dict[str, Any]) -> CheckpointProbe:
    """Return figures as they were measured: JSON has null for one that is not a number."""
    measured: dict[str, Any] = {
        name: math.nan if value is None and name != "win_rate" else value for name, value in figures.items()
    }
    return CheckpointProbe(**measured)


def _key(phase: str) -> str:
    return f"events/{phase}/collapse.json"
