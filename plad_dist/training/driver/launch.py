"""Training of several phases by one worker group, with restarts of Ray Train's controller.

Phases that follow each other share a worker group, because starting one takes its time.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.train import ControllerError

from plad_dist.config import Config
from plad_dist.data.models import model_fingerprint
from plad_dist.errors import RunFailed, UserError
from plad_dist.progress import Progress
from plad_dist.rundir import RunDir
from plad_dist.training.checkpoints.store import CheckpointStore
from plad_dist.training.driver.collapse_watch import watching
from plad_dist.training.driver.elastic import GroupSettings, WorkerGroupCallbacks
from plad_dist.training.driver.failures import describe_failure, root_cause
from plad_dist.training.driver.mailbox import open_mailbox
from plad_dist.training.driver.owner_watch import stopped_if_superseded
from plad_dist.training.driver.trainer import build_trainer, preserved_sigint_handler, ray_train_timeouts
from plad_dist.training.driver.warm import warm_workers
from plad_dist.training.job import PhaseJob
from plad_dist.training.worker.seat import NURSERY

_MAX_STARTS = 10  # of a controller in a row without a new checkpoint


@dataclass(frozen=True)
class SavedProgress:
    """Progress of a sequence of phases that a restart does not lose.

    Attributes:
        phase: the phase that is being trained.
        checkpoint: its newest checkpoint, in words.
    """

    phase: str
    checkpoint: str


def fit(jobs: list[PhaseJob], config: Config, run: RunDir, progress: Progress) -> None:
    """Train phases with one worker group at a time, to their ends or to a stop.

    Raises:
        UserError: a worker met an error of the user.
        RunFailed: training failed more often than allowed, or a later command has claimed the run.
        KeyboardInterrupt: the user stopped it.
    """
    fewest, most = config.training.workers
    names = ", ".join(job.name for job in jobs)
    with (
        stopped_if_superseded(run.storage),
        ray_train_timeouts(config),
        open_mailbox(progress, jobs[-1].name, config.training.max_failures) as mailbox,
        watching(jobs, config, run, mailbox, progress),
        warm_workers(config),
    ):
        group = GroupSettings(
            names,
            fewest,
            most,
            config.cluster.start_timeout_s,
            config.training.resize_check_s,
            NURSERY if config.cluster.warm_starts else None,
        )
        callbacks = WorkerGroupCallbacks(mailbox, group)
        starts = _StartLimit(saved_progress(jobs, run))
        while True:
            try:
                with preserved_sigint_handler():
                    build_trainer(jobs, config, run, mailbox, callbacks).fit()
                return
            except SystemExit:  # raised by Ray Train on Ctrl-C, after it has stopped the workers
                saved = saved_progress(jobs, run)
                progress.say(f"train {saved.phase}: stopped; kept: {saved.checkpoint}")
                raise KeyboardInterrupt from None
            except ControllerError as error:
                if not starts.may_restart_after(error, saved_progress(jobs, run)):
                    raise explained(error, saved_progress(jobs, run)) from error
                mailbox.disrupted.remote()
                progress.say(f"train {names}: {describe_failure(error)}; the workers are restarted")
            except Exception as error:
                raise explained(error, saved_progress(jobs, run)) from error


class _StartLimit:
    """Decides if a failed controller is restarted.

    Ray Train takes a death while a group starts, such as at the rendezvous, for an error of its
    controller and gives up.
    """

    def __init__(self, saved: SavedProgress) -> None:
        self._saved, self._starts = saved, 0

    def may_restart_after(self, error: ControllerError, saved: SavedProgress) -> bool:
        """Return False for an error of our own code, and after too many starts without progress."""
        if isinstance(root_cause(error), RunFailed):
            return False
        self._starts = 1 if saved != self._saved else self._starts + 1
        self._saved = saved
        return self._starts < _MAX_STARTS


def explained(error: Exception, saved: SavedProgress) -> Exception:
    """Return the error to raise for a failed training.

    A UserError of a worker is returned unchanged. Any other error becomes a RunFailed whose message
    names the phase and the checkpoint that is kept.
    """
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    cause = root_cause(failures[0] if failures else error)
    if isinstance(cause, UserError):
        return cause
    return RunFailed(
        f"phase {saved.phase}: {describe_failure(error)}. Kept: {saved.checkpoint}. The workers' logs are in Ray's "
        "session folder (/tmp/ray/session_latest/logs). Run again to resume."
    )


def saved_progress(jobs: list[PhaseJob], run: RunDir) -> SavedProgress:
    """Return the progress of the first phase without a model, or of the last one."""
    job = next((job for job in jobs if model_fingerprint(run.model(job.name)) != job.fingerprint), jobs[-1])
    latest, _ = CheckpointStore(job.checkpoints, job.name, job.fingerprint).newest()
    return SavedProgress(
        job.name, f"the checkpoint of step {latest.state.step}" if latest else "no checkpoint was written yet"
    )
