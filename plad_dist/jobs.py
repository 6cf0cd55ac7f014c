"""Runs as Ray jobs: submitted to a cluster's job server over HTTP, followed, stopped. The cluster may be far away."""

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
from plad_dist.errors import RunFailed, UserError
from plad_dist.reach import unreachable
from plad_dist.resources import resource
from plad_dist.rundir import RunDir

logger = logging.getLogger("plad")

Stage = Literal["sample", "pair", "train", "evaluate", "distill"]
STAGES: tuple[Stage, ...] = get_args(Stage)
_STOP_S, _RECONNECTS = 60.0, 5
_AGENT_S = 120.0
_CONFIG = "run.yaml"
_ACTIVE = ("PENDING", "RUNNING")


def load_submitted(file: str, overrides: list[str]) -> Config:
    """The config of a run that is to be submitted. Raises :class:`UserError` for what a cluster need not be asked about."""
    # What only a submit needs brings torch along, which status, logs and stop should not wait for.
    from plad_dist.preflight import check_engines

    config = load_config(file, overrides)
    _refuse_relative(config)
    check_engines(config)  # a secret among their arguments would be seen by all who see the job
    return config


class JobServer:
    """The job server of one cluster.

    Every call raises :class:`UserError` for a wrong address or token, and :class:`RunFailed` where the cluster stops answering.

    Args:
        address: of the dashboard, such as http://host:8265; None for RAY_API_SERVER_ADDRESS, or the cluster of this machine.
    """

    def __init__(self, address: str | None) -> None:
        from ray.job_submission import JobSubmissionClient

        self.address = _reachable(address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265")
        with self._asking(begins=True):
            self._client: Any = JobSubmissionClient(self.address)

    def submit(self, config: Config, file: str, overrides: list[str], stage: Stage) -> str:
        """Submit a stage of a run and return the job's name. Submitted again after it has ended, it goes on where it was left.

        Args:
            config: as :func:`load_submitted` reads it from the file.

        Raises:
            UserError: the config does not fit, or a job of the same run is under way.
        """
        self._refuse_unfit(config)
        run_dir = RunDir.of(config).storage.url
        earlier = [job for job in self.jobs() if job.metadata.get("run_dir") == run_dir]
        last = max(
            (int(number) for job in earlier if (number := job.submission_id.rpartition("-")[2]).isdigit()), default=0
        )
        for job in earlier:
            if job.status in _ACTIVE:
                raise UserError(_busy(run_dir, job.submission_id))
        # Two that are submitted at once get the same name, which the server takes once.
        digest = hashlib.sha256(run_dir.encode()).hexdigest()[:6]
        name = f"plad-{_plain(Path(run_dir).name)}-{digest}-{last + 1}"
        with tempfile.TemporaryDirectory(prefix="plad-submit-") as temporary:
            folder = Path(temporary)
            shutil.copy(file, folder / _CONFIG)
            shutil.copytree(resource("ray_jobs"), folder / "ray_jobs", ignore=shutil.ignore_patterns("__pycache__"))
            entrypoint = shlex.join(["python", f"ray_jobs/{stage}.py", "--config", _CONFIG, *overrides])
            metadata = {"run_dir": run_dir, "stage": stage, "fingerprint": config.fingerprint()}
            try:
                self._send(entrypoint, name, folder, metadata)
            except RunFailed as error:
                if "already exists" in str(error):
                    raise UserError(_busy(run_dir, name)) from None
                raise
        return name

    def _send(self, entrypoint: str, name: str, folder: Path, metadata: dict[str, str]) -> None:
        """Give a job to the server, which can take none until the agents of a new head are up."""
        environment = {"working_dir": str(folder), "env_vars": {"PLAD_VERSION": __version__}}
        end = time.monotonic() + _AGENT_S
        while True:
            try:
                with self._asking():
                    self._client.submit_job(
                        entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata=metadata
                    )
                return
            except RunFailed as error:
                if "No available agent" not in str(error):
                    raise
                if time.monotonic() > end:
                    raise RunFailed(
                        f"{error} Its agent did not come up within {_AGENT_S:.0f} s: dashboard_agent.log in Ray's logs on the head says why. Two "
                        "Rays on one machine need a --dashboard-agent-listen-port each"
                    ) from None
                logger.info("%s has no agent yet that takes jobs; asking again", self.address)
                time.sleep(2.0)

    def follow(self, job: str, show: Callable[[str], None]) -> str:
        """Show what a job says until it has ended; returns the state that it ended in.

        Raises:
            UserError: there is no such job.
            RunFailed: the cluster does not answer any more.
        """
        self.job(job)
        log, tries = _Log(show), 0
        while tries <= _RECONNECTS:
            before = log.shown
            try:
                asyncio.run(self._tail(job, log))
                if (state := self.job(job).status) not in _ACTIVE:
                    return str(state)
                tries = 0
            except (RuntimeError, OSError, RunFailed, ClientError) as error:
                logger.debug("the connection to %s broke: %s", self.address, error)
                tries = 1 if log.shown > before else tries + 1
            time.sleep(min(30.0, 2.0**tries))
        raise RunFailed(self._gone())

    async def _tail(self, job: str, log: _Log) -> None:
        log.begin()  # a new connection is sent all of it
        async for text in self._client.tail_job_logs(job):
            log.add(text)

    def logs(self, job: str) -> str:
        """What a job has said so far."""
        with self._asking(job):
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> str:
        """End a job and wait until it has; returns its state."""
        with self._asking(job):
            self._client.stop_job(job)
        end = time.monotonic() + _STOP_S
        while (state := self.job(job).status) in _ACTIVE:
            if time.monotonic() > end:
                raise RunFailed(f"{job}: still {state} {_STOP_S:.0f} s after it was told to stop; see {self.address}")
            time.sleep(0.5)
        return str(state)

    def job(self, job: str) -> Any:
        """State of a job, as the server has it."""
        with self._asking(job):
            return self._client.get_job_info(job)

    def jobs(self) -> list[Any]:
        """Jobs of this product, the newest first."""
        with self._asking():
            found = [job for job in self._client.list_jobs() if job.submission_id and "run_dir" in (job.metadata or {})]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def newest(self) -> str:
        """Name of the newest job. Raises :class:`UserError` where there is none."""
        jobs = self.jobs()
        if not jobs:
            raise UserError(f"{self.address}: has no job of plad-dist")
        return str(jobs[0].submission_id)

    def _refuse_unfit(self, config: Config) -> None:
        from ray.util.state import list_nodes

        from plad_dist.cluster import refuse_unfit
        from plad_dist.planning.hardware import hardware_of_nodes

        try:
            nodes = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")])
        except Exception as error:  # noqa: BLE001 - whatever the state server has against it; the job plans again
            logger.info("not planned from here, the job does it there: %r", error)
            return
        resources = [node.resources_total for node in nodes]
        if any(node.get("GPU") for node in resources):  # one without may gain some; the job knows what it is made for
            refuse_unfit(config, hardware_of_nodes(resources))

    @contextmanager
    def _asking(self, job: str | None = None, *, begins: bool = False) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"{self.address}: {_about_token(error.message)}") from None
        except OSError:
            raise UserError(_no_answer(self.address)) if begins else RunFailed(self._gone()) from None
        except RuntimeError as error:
            if begins:
                raise UserError(
                    f"{self.address}: what answers there is no Ray dashboard; --address or RAY_API_SERVER_ADDRESS names it, such as "
                    "http://host:8265"
                ) from None
            if job is not None and "404" in str(error):
                raise UserError(f"{self.address}: has no job {job}; `plad status` lists them") from None
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            told = (
                lines[-1] if "Traceback" in lines[0] else lines[0]
            )  # the server sends its own, and the reason at its end
            raise RunFailed(f"{self.address}: {told:.300}") from None

    def _gone(self) -> str:
        return (
            f"{self.address} does not answer any more: its head node is dead, or the way to it is cut. What the run has committed is kept. "
            "When a cluster is up, submit the same config again and it goes on"
        )


class _Log:
    """A job's log as it is sent, shown once however often it is sent from its beginning."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.shown = self._seen = 0

    def begin(self) -> None:
        """It is sent from its beginning."""
        self._seen = 0

    def add(self, text: str) -> None:
        """The next piece."""
        new = text[max(0, self.shown - self._seen) :]
        self._seen += len(text)
        self.shown = max(self.shown, self._seen)
        if new:
            self._show(new)


def job_table(jobs: list[Any], address: str) -> Table:
    """One line for each job."""
    table = Table("job", "state", "stage", "run directory", "began", title=address)
    for job in jobs:
        began = (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000)) if job.start_time else ""
        )
        told = job.metadata or {}
        table.add_row(job.submission_id, str(job.status), told.get("stage", ""), told.get("run_dir", ""), began)
    return table


def _busy(run_dir: str, job: str) -> str:
    return f"{run_dir}: job {job} works on this run already. `plad logs {job} --follow` shows it, `plad stop {job}` ends it"


def _refuse_relative(config: Config) -> None:
    """Raise :class:`UserError` for places that would lie in the job's own folder, which goes away with the job."""
    places = {
        "run.dir": config.run.dir,
        "run.reuse": config.run.reuse,
        "training.checkpoint_url": config.training.checkpoint_url,
        "training.staging_dir": config.training.staging_dir,
    }
    for key, place in places.items():
        if place is not None and "://" not in place and not Path(place).is_absolute():
            raise UserError(
                f"{key}: {place}: is relative, and a job has no lasting folder: give an absolute path that all nodes share, or a URI; "
                f"{key}=/mnt/shared/... after the config sets it"
            )


def _reachable(address: str) -> str:
    """The address, if something listens there."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        is_url = parts.scheme in ("http", "https")
    except ValueError:
        host, is_url = None, False
    if not host or not is_url:
        raise UserError(f"--address {address}: expected the dashboard's URL, such as http://host:8265")
    if (problem := unreachable(host, port)) is not None:
        raise UserError(f"{_no_answer(address)} ({problem})")
    return address


def _no_answer(address: str) -> str:
    return (
        f"{address}: no Ray dashboard answers there. Is the address right, the head node up, and the port forwarded "
        "(kubectl port-forward service/...-head-svc 8265)? --address or RAY_API_SERVER_ADDRESS names it"
    )


def _about_token(message: str) -> str:
    if message.startswith("Authentication required"):
        return "wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
    return (
        "refuses this token: it is wrong, or has expired. Get the cluster's (on Kubernetes from the secret of its name) and set RAY_AUTH_TOKEN, or "
        "RAY_AUTH_TOKEN_PATH to a file with it"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name) or "run"
