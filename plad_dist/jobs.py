"""Ray jobs: submit a run to a cluster's job server over HTTP, follow its log, stop it.

Only the dashboard's port must be reachable, so the cluster may be far away. A job runs a script of
`ray_jobs/`, which calls the same `plad` command on the cluster. One job at a time works on a run.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from aiohttp import ClientError
from rich.table import Table

from plad_dist import __version__
from plad_dist.config import Config
from plad_dist.config_file import load_config
from plad_dist.config_yaml import dump_yaml
from plad_dist.errors import RunFailed, UserError
from plad_dist.reach import connection_problem
from plad_dist.resources import resource
from plad_dist.rundir import RunDir
from plad_dist.untrusted import cell, harmless

logger = logging.getLogger("plad")

Stage = Literal["sample", "pair", "train", "evaluate", "distill"]
STAGES: tuple[Stage, ...] = get_args(Stage)
_STOP_TIMEOUT_S = 60.0
_MAX_RECONNECTS = 5
_AGENT_TIMEOUT_S = 120.0
_CONFIG_FILE = "run.yaml"
_ACTIVE_STATES = ("PENDING", "RUNNING")
_LATEST_MS = 4e12  # in the year 2096
_BAD_INPUT_CODE = 2  # exit code of a `plad` command that ended with a UserError


def check_stage(name: str) -> Stage:
    """Return the stage of that name. Raises :class:`UserError` if there is none."""
    stage = next((stage for stage in STAGES if stage == name), None)
    if stage is None:
        raise UserError(f"--stage {name}: expected one of {', '.join(STAGES)}")
    return stage


def is_run_dir(target: str, address: str | None) -> bool:
    """Return True if an argument of `plad status` names a run directory, and not a job.

    A job is the target if a cluster is named, or if the target looks like a name that `plad submit`
    or `ray job submit` gives. An existing folder of such a name is a run directory all the same.
    """
    return (address is None and not target.startswith(("plad-", "raysubmit_"))) or Path(target).is_dir()


def load_submitted(file: str, overrides: list[str]) -> Config:
    """Load the config of a run to submit.

    Raises :class:`UserError` for faults that show without a cluster.
    """
    # `check_engines` imports torch, for which the other commands on jobs need not wait.
    from plad_dist.preflight import check_engines

    config = load_config(file, overrides)
    _refuse_relative_paths(config)
    check_engines(config)  # a secret in the engine arguments would be shown to everyone who sees the job
    return config


def submitted_document(config: Config) -> str:
    """Return the file of a submitted config.

    Its paths are expanded here, since the cluster has other variables and another home.
    """
    return dump_yaml(config.model_dump(mode="json", exclude_unset=True))


class JobServer:
    """Client of the job server of one cluster.

    Every method raises :class:`UserError` for a wrong address or token, and :class:`RunFailed` if
    the cluster stops answering.

    Args:
        address: URL of the dashboard, such as http://host:8265; None for RAY_API_SERVER_ADDRESS, or
            else the cluster of this machine.
    """

    def __init__(self, address: str | None) -> None:
        from ray.job_submission import JobSubmissionClient

        self.address = _reachable(address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265")
        with self._explained_errors(is_first_contact=True):
            self._client: Any = JobSubmissionClient(self.address)

    def submit(self, config: Config, stage: Stage) -> str:
        """Submit a stage of a run and return the job's name. A run that is submitted again resumes.

        Args:
            config: as :func:`load_submitted` returns it.

        Raises:
            UserError: the config does not fit, or a job works on the run already.
        """
        self._refuse_unfit(config)
        run_dir = RunDir.of(config).storage.url
        earlier = [job for job in self.jobs() if _metadata(job).get("run_dir") == run_dir]
        for job in earlier:
            if job.status in _ACTIVE_STATES:
                raise UserError(_busy_message(run_dir, job.submission_id))
        # Two simultaneous submissions get the same name, which the server accepts only once.
        name = _next_name(run_dir, [job.submission_id for job in earlier])
        with tempfile.TemporaryDirectory(prefix="plad-submit-") as temporary:
            folder = Path(temporary)
            (folder / _CONFIG_FILE).write_text(submitted_document(config), encoding="utf-8")
            shutil.copytree(resource("ray_jobs"), folder / "ray_jobs", ignore=shutil.ignore_patterns("__pycache__"))
            entrypoint = shlex.join(["python", f"ray_jobs/{stage}.py", "--config", _CONFIG_FILE])
            metadata = {"run_dir": run_dir, "stage": stage, "fingerprint": config.fingerprint()}
            try:
                self._submit_once_up(entrypoint, name, folder, metadata)
            except RunFailed as error:
                if "already exists" in str(error):
                    raise UserError(_busy_message(run_dir, name)) from None
                raise
        return name

    def _submit_once_up(self, entrypoint: str, name: str, folder: Path, metadata: dict[str, str]) -> None:
        """Submit a job, and repeat this until the agents of a new head accept jobs."""
        environment = {"working_dir": str(folder), "env_vars": {"PLAD_VERSION": __version__}}
        deadline = time.monotonic() + _AGENT_TIMEOUT_S
        while True:
            try:
                with self._explained_errors():
                    self._client.submit_job(
                        entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata=metadata
                    )
                return
            except RunFailed as error:
                if "No available agent" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise RunFailed(
                        f"{error} The agent did not start within {_AGENT_TIMEOUT_S:.0f} s; for the reason see "
                        "dashboard_agent.log in Ray's logs on the head. Two Ray clusters on one machine each need "
                        "their own --dashboard-agent-listen-port"
                    ) from None
                logger.info("%s has no agent that accepts jobs yet; trying again", self.address)
                time.sleep(2.0)

    def follow(self, job: str, show: Callable[[str], None]) -> None:
        """Show a job's log until the job ends, and end like the job.

        Args:
            show: takes the next piece of the log.

        Raises:
            UserError: the job does not exist, or failed because of bad input.
            RunFailed: the job failed or was stopped, or the cluster stopped answering.
        """
        state = self._follow_to_end(job, show)
        if state == "STOPPED":
            raise RunFailed(f"{job} was stopped. Committed results are kept; submit the same config again to resume")
        if state != "SUCCEEDED":
            is_bad_input = self.job(job).driver_exit_code == _BAD_INPUT_CODE
            raise (UserError if is_bad_input else RunFailed)(f"{job}: {state}; the end of its log is above")

    def _follow_to_end(self, job: str, show: Callable[[str], None]) -> str:
        """Show a log until its job ends, across broken connections, and return the last state."""
        self.job(job)
        log, failures = _Log(show), 0
        while failures <= _MAX_RECONNECTS:
            shown_before = log.shown
            try:
                asyncio.run(self._tail(job, log))
                if (state := self.job(job).status) not in _ACTIVE_STATES:
                    return str(state)
                failures = 0
            except (RuntimeError, OSError, RunFailed, ClientError) as error:
                logger.debug("the connection to %s broke: %s", self.address, error)
                failures = 1 if log.shown > shown_before else failures + 1
            time.sleep(min(30.0, 2.0**failures))
        raise RunFailed(self._stopped_answering())

    async def _tail(self, job: str, log: _Log) -> None:
        log.restart()  # a new connection receives the whole log
        async for text in self._client.tail_job_logs(job):
            log.add(text)

    def logs(self, job: str) -> str:
        """Return the log of a job up to now."""
        with self._explained_errors(job):
            return harmless(str(self._client.get_job_logs(job)))

    def stop(self, job: str) -> str:
        """Stop a job, wait until it has ended, and return its state."""
        with self._explained_errors(job):
            self._client.stop_job(job)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while (state := self.job(job).status) in _ACTIVE_STATES:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{job}: still {state} {_STOP_TIMEOUT_S:.0f} s after the request to stop; see {self.address}"
                )
            time.sleep(0.5)
        return str(state)

    def job(self, job: str) -> Any:
        """Return Ray's `JobDetails` of a job."""
        with self._explained_errors(job):
            return self._client.get_job_info(job)

    def jobs(self) -> list[Any]:
        """Return Ray's `JobDetails` of the jobs of plad-dist, newest first."""
        with self._explained_errors():
            jobs = [job for job in self._client.list_jobs() if isinstance(_metadata(job).get("run_dir"), str)]
        named = [job for job in jobs if isinstance(job.submission_id, str) and job.submission_id]
        return sorted(named, key=_start_time, reverse=True)

    def newest(self) -> str:
        """Return the name of the newest job. Raises :class:`UserError` if there is none."""
        jobs = self.jobs()
        if not jobs:
            raise UserError(f"{self.address}: has no job of plad-dist")
        return str(jobs[0].submission_id)

    def _refuse_unfit(self, config: Config) -> None:
        """Raise :class:`UserError` if a run does not fit the cluster as it is now."""
        from ray.util.state import list_nodes

        from plad_dist.cluster import refuse_unfit
        from plad_dist.planning.hardware import hardware_of_nodes

        try:
            nodes = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")])
        except Exception as error:  # noqa: BLE001 - any fault of the state server; the job checks again
            logger.info("memory is not checked here but by the job: %r", error)
            return
        resources = [node.resources_total for node in nodes]
        if any(
            node.get("GPU") for node in resources
        ):  # without GPUs yet, the cluster may still add nodes that have them
            refuse_unfit(config, hardware_of_nodes(resources))

    @contextmanager
    def _explained_errors(self, job: str | None = None, *, is_first_contact: bool = False) -> Iterator[None]:
        """Turn the errors of Ray's client into messages for the user.

        Args:
            job: the job that a request names, if any.
            is_first_contact: nothing has answered at the address yet, so the address may be wrong.
        """
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"{self.address}: {_token_advice(error.message)}") from None
        except OSError:
            raise (
                UserError(_no_answer(self.address)) if is_first_contact else RunFailed(self._stopped_answering())
            ) from None
        except RuntimeError as error:
            if is_first_contact:
                raise UserError(
                    f"{self.address}: is no Ray dashboard; give its URL with --address or RAY_API_SERVER_ADDRESS, such "
                    "as http://host:8265"
                ) from None
            if job is not None and "404" in str(error):
                raise UserError(f"{self.address}: has no job {job}; `plad status` lists the jobs") from None
            raise RunFailed(f"{self.address}: {_reason(error):.300}") from None

    def _stopped_answering(self) -> str:
        return (
            f"{self.address} does not answer any more: its head node is dead or unreachable. Committed results are "
            "kept. When a cluster is up, submit the same config again to resume"
        )


class _Log:
    """A job's log, shown once although every connection receives it from its beginning.

    Attributes:
        shown: characters shown up to now.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.shown = self._received = 0

    def restart(self) -> None:
        """Expect the log from its beginning."""
        self._received = 0

    def add(self, text: str) -> None:
        """Take the next piece, and show what was not shown before."""
        new = text[max(0, self.shown - self._received) :]
        self._received += len(text)
        self.shown = max(self.shown, self._received)
        if new:
            self._show(harmless(new))


def job_table(jobs: list[Any], address: str) -> Table:
    """Return a table with one line for each job."""
    table = Table("job", "state", "stage", "run directory", "began", title=cell(address))
    for job in jobs:
        texts = (_metadata(job).get(name, "") for name in ("stage", "run_dir"))
        table.add_row(cell(job.submission_id), cell(str(job.status)), *map(cell, texts), cell(_began(job)))
    return table


def _metadata(job: Any) -> dict[str, Any]:
    """Return what the submitter says of a job. On a shared server, others may say anything."""
    return job.metadata if isinstance(job.metadata, dict) else {}


def _start_time(job: Any) -> float:
    """Return the start of a job in milliseconds since 1970, 0 without a possible one."""
    time_ms = job.start_time
    is_number = isinstance(time_ms, int | float) and not isinstance(time_ms, bool)
    return float(time_ms) if is_number and 0 < time_ms < _LATEST_MS else 0.0


def _began(job: Any) -> str:
    started_ms = _start_time(job)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started_ms / 1000)) if started_ms else ""


def _next_name(run_dir: str, earlier: list[str]) -> str:
    """Return the name of a run's next job: the run's, a hash of its path, and a number."""
    numbers = (name.rpartition("-")[2] for name in earlier)
    last = max((int(number) for number in numbers if re.fullmatch("[0-9]{1,9}", number)), default=0)
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(run_dir).name) or "run"
    return f"plad-{plain}-{hashlib.sha256(run_dir.encode()).hexdigest()[:6]}-{last + 1}"


def _busy_message(run_dir: str, job: str) -> str:
    return (
        f"{run_dir}: job {job} works on this run already; `plad logs {job} --follow` shows it, `plad stop {job}` ends "
        "it"
    )


def _refuse_relative_paths(config: Config) -> None:
    """Raise :class:`UserError` for paths inside the job's working directory, which is deleted with
    the job."""
    paths = {
        "run.dir": config.run.dir,
        "run.reuse": config.run.reuse,
        "training.checkpoint_url": config.training.checkpoint_url,
        "training.staging_dir": config.training.staging_dir,
    }
    for key, path in paths.items():
        if path is not None and "://" not in path and not Path(path).is_absolute():
            raise UserError(
                f"{key}: {path}: is relative, and the working directory of a job is deleted with it; give a URI or an "
                f"absolute path that all nodes share, for example by adding {key}=/mnt/shared/... to the command"
            )


def _reachable(address: str) -> str:
    """Return a dashboard's address.

    Raises :class:`UserError` if it is no URL or nothing listens there.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        is_url = parts.scheme in ("http", "https")
    except ValueError:
        host, is_url = None, False
    if not host or not is_url:
        raise UserError(f"--address {address}: expected the dashboard's URL, such as http://host:8265")
    if (problem := connection_problem(host, port)) is not None:
        raise UserError(f"{_no_answer(address)} ({problem})")
    return address


def _no_answer(address: str) -> str:
    return (
        f"{address}: no Ray dashboard answers there. Check the address (--address or RAY_API_SERVER_ADDRESS), that the "
        "head node is up, and that the port is forwarded (kubectl port-forward service/...-head-svc 8265)"
    )


def _token_advice(message: str) -> str:
    if message.startswith("Authentication required"):
        return (
            "requires a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that "
            "contains the token"
        )
    return (
        "refuses this token: it is wrong, or has expired. Get the cluster's token (on Kubernetes from the secret with "
        "the cluster's name) and set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that contains it"
    )


def _reason(error: RuntimeError) -> str:
    """Return the line with the reason: the last one of a traceback that the server sends, otherwise
    the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "Traceback" in lines[0] else lines[0]
