"""Signals that ranks exchange with the sums of a step, so that all ranks act on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepSignals:
    """Requests and states of one rank and, after the reduction of a step, of any rank.

    Attributes:
        save: a checkpoint is due.
        check_preemption: it is time to ask Ray for leaving nodes.
        leave: write a checkpoint, then take no further step.
        superseded: a later attempt has started.
        upload_pending: the latest checkpoint is still being uploaded.
        upload_failed: the upload of the latest checkpoint has failed.
        collapsed: the collapse watch has found a collapsed checkpoint of this phase.
    """

    save: bool = False
    check_preemption: bool = False
    leave: bool = False
    superseded: bool = False
    upload_pending: bool = False
    upload_failed: bool = False
    collapsed: bool = False


NO_SIGNALS = StepSignals()
