"""`plad doctor`: whether this machine, every node of a cluster, and what a config names are fit for a run.

Checks of one machine are in :mod:`plad_dist.doctor.node_checks`, of what it reaches in :mod:`plad_dist.doctor.reach_checks`; here nodes are asked and compared, and a config's models
are looked at. What is written for it goes into one folder of its own in each storage, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.table import Table
from rich.text import Text

from plad_dist.config import Config, Endpoint, LlmJudge, Model
from plad_dist.doctor import node_checks, reach_checks
from plad_dist.doctor.node_checks import (
    PROBE,
    Finding,
    Node,
    StorageSite,
    fail,
    findings_of,
    installed_versions,
    ok,
    size,
    warn,
)
from plad_dist.errors import RunFailed, UserError, first_line
from plad_dist.planning.fit import check_fits, sizes_of
from plad_dist.planning.hardware import Hardware, hardware_here, hardware_of_nodes
from plad_dist.planning.workload import disk_bytes, workload_of
from plad_dist.reach import silent
from plad_dist.rundir import RUN_FILE, RunDir

logger = logging.getLogger("plad")

HERE = "this machine"
NODE_TIMEOUT_S, CLOCK_TIMEOUT_S = 180.0, 20.0
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 30.0
_CLOCK_READINGS = 3
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_ALONE = "none is named by --address, cluster.address or RAY_ADDRESS: this machine alone was looked at"
_CORRECT = "correct the config, or put what it names in its place; `plad validate` checks it again"

NODE_CHECKS: dict[str, Callable[[Node], Iterable[Finding]]] = {
    "versions": node_checks.versions,
    "engine": node_checks.engine,
    "GPUs": node_checks.gpus,
    "network": node_checks.network,
    "shared memory": node_checks.shared_memory,
    "memory, CPUs": node_checks.limits,
    "open files": node_checks.open_files,
    "disk": node_checks.disk,
    "storage": reach_checks.storage,
    "endpoints": reach_checks.endpoints,
    "environment": reach_checks.environment,
}
DRIVER_CHECKS = ("versions", "disk", "storage", "environment")  # the rest is the nodes' business

Reading = tuple[float, float, float]  # seconds: asked here, the time there, answered here


def examine(config: Config | None, address: str | None = None) -> list[Finding]:
    """All findings. Starts no Ray: a cluster's nodes are asked where one is named.

    Raises:
        UserError: run.dir or training.checkpoint_url is no storage.
    """
    address = address or (config.cluster.address if config else None) or os.environ.get("RAY_ADDRESS")
    here = replace(_wanted(config), role="driver" if address and address != "local" else "alone")
    with probes(here.places) as held:
        found, versions = node_findings(here)
        if address and here.role == "driver":
            members = replace(here, places=held)
            found += findings_of("cluster", address, partial(_cluster, address, members, versions, config))
        else:
            found.append(Finding("cluster", HERE, "ok", _ALONE))
            if config is not None:
                found += findings_of("plan", HERE, partial(_fit, config))
    return found + (config_findings(config) if config else [])


def node_findings(node: Node) -> tuple[list[Finding], dict[str, str]]:
    """All findings of the machine that this runs on, and the versions that must be alike on all."""
    names = DRIVER_CHECKS if node.role == "driver" else tuple(NODE_CHECKS)
    found = [finding for name in names for finding in findings_of(name, node.name, partial(NODE_CHECKS[name], node))]
    return found, installed_versions()


def _wanted(config: Config | None) -> Node:
    """This machine, with all that a config wants of any."""
    ray_folder = str(Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray")  # noqa: S108 - Ray's own default
    if config is None:
        return Node(HERE, ray_folder=ray_folder)
    run, probe = RunDir.of(config), f".doctor-{uuid.uuid4().hex}"
    places = [StorageSite("run.dir", run.storage.url, probe)]
    if config.training.checkpoint_url:
        places.append(StorageSite("training.checkpoint_url", run.checkpoints(config).url, probe))
    endpoints: list[tuple[str, Endpoint]] = []
    hub_models = []
    for key, model in _models_of(config):
        if model.endpoint is not None:
            endpoints.append((f"{key}.endpoint", model.endpoint))
        elif model.path is not None and not _is_local(model.path):
            hub_models.append(model.path)
    return Node(
        HERE,
        places=tuple(places),
        endpoints=tuple(endpoints),
        staging=config.training.staging_dir,
        hub_models=tuple(hub_models),
        ray_folder=ray_folder,
    )


def _is_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or Path(path).exists()


def _models_of(config: Config) -> list[tuple[str, Model]]:
    """Every model that the config names, by its key."""
    judges = config.evaluation.judges.items()
    asked = {f"evaluation.judges.{name}.model": judge.model for name, judge in judges if isinstance(judge, LlmJudge)}
    return [*config.named_models().items(), *asked.items()]


@contextmanager
def probes(places: Sequence[StorageSite]) -> Iterator[tuple[StorageSite, ...]]:
    """Gives the places into which a probe could be written. It, and folders that were made for it, are removed afterwards."""
    made: list[Path] = []
    held = []
    try:
        for place in places:
            with contextlib.suppress(RunFailed, UserError, OSError):  # the storage's check tells why
                root = place.probes.local_root
                made += [path for path in root.parents if not path.exists()] if root else []
                place.probes.replace(PROBE, b"")
                held.append(place)
        yield tuple(held)
    finally:
        for place in places:
            with contextlib.suppress(RunFailed, UserError):
                place.storage.delete_folder(place.probe)
        for folder in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


# ------------------------------------------------------------------------------------------------------------- cluster


def _cluster(address: str, wanted: Node, versions: dict[str, str], config: Config | None) -> Iterator[Finding]:
    """Join the cluster, ask every living node, compare them."""
    start = "start it, or correct --address, cluster.address or RAY_ADDRESS"
    if address.startswith(("http://", "https://")):
        host = urlsplit(address).hostname or "host"
        yield fail(
            "is the URL of a dashboard, which only jobs are submitted to",
            f"give the address of Ray itself, {host}:6379 by default; from outside a Kubernetes cluster run the doctor in a pod of it",
        )
        return
    if (problem := silent(address)) is not None:
        yield fail(f"no Ray cluster answers there: {problem}", start)
        return
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # noqa: BLE001 - other versions, a wrong token, ...: whatever it says is the finding
        yield fail(f"cannot be joined: {first_line(error):.300}", f"{start}; Ray and Python must be those of the nodes")
        return
    try:
        living = [node for node in ray.nodes() if node["Alive"]]
        logger.info("doctor: asking %d node(s) of %s", len(living), address)
        resources = ray.cluster_resources()
        yield ok(f"{len(living)} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")
        yield from _members(named(living, wanted), versions)
        if config is not None and (hardware := hardware_of_nodes([node["Resources"] for node in living])) is not None:
            yield from findings_of("plan", "", partial(_fit, config, hardware))
    finally:
        ray.shutdown()


def named(living: Sequence[Mapping[str, Any]], wanted: Node) -> dict[str, Node]:
    """The nodes of a cluster by their ids, each with the shortest name that no other has."""
    taken = [name for node in living for name in {node["NodeManagerHostname"], node["NodeManagerAddress"]}]
    found = {}
    for node in living:
        address = node["NodeManagerAddress"]
        unique = [name for name in (node["NodeManagerHostname"], address) if taken.count(name) == 1]
        folders = Path(node.get("ObjectStoreSocketName") or "/").parents  # .../ray/session_.../sockets/plasma_store
        found[node["NodeID"]] = replace(
            wanted,
            name=unique[0] if unique else f"{address} ({node['NodeID'][:6]})",
            role="member",
            gpus=node["Resources"].get("GPU", 0),
            object_store=node["Resources"].get("object_store_memory"),
            ray_folder=str(folders[2]) if len(folders) > 2 else wanted.ray_folder,
        )
    return found


def _members(nodes: Mapping[str, Node], versions: dict[str, str]) -> Iterator[Finding]:
    theirs: dict[str, dict[str, str]] = {}
    answering: dict[str, Node] = {}
    for key, outcome in _ask(node_findings, {key: (node,) for key, node in nodes.items()}, NODE_TIMEOUT_S):
        name = nodes[key].name
        if isinstance(outcome, tuple):
            yield from outcome[0]
            theirs[name], answering[key] = outcome[1], nodes[key]
        else:
            yield unanswered(name, outcome)
    yield from alike(versions, theirs)
    readings: dict[str, list[Reading]] = defaultdict(list)
    for _ in range(_CLOCK_READINGS):  # by then a process is up there, so that an answer takes no time
        asked = time.time()
        for key, there in _ask(read_clock, dict.fromkeys(answering, ()), CLOCK_TIMEOUT_S):
            if isinstance(there, float):
                readings[answering[key].name].append((asked, there, time.time()))
    for node in answering.values():
        yield clock(node.name, readings[node.name])


def _ask(function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]], timeout_s: float) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Call a function on nodes, all at once. Gives (node's id, result); an exception, or None for no answer, in its place."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    waiting = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False)).remote(*given): key
        for key, given in arguments.items()
    }
    deadline = time.monotonic() + timeout_s
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        try:
            outcome = ray.get(done[0])
        except Exception as error:  # noqa: BLE001 - of one node
            outcome = error
        yield waiting.pop(done[0]), outcome
    for reference, key in waiting.items():
        ray.cancel(reference, force=True)
        yield key, None


def read_clock() -> float:
    """The time on a node."""
    return time.time()


def unanswered(name: str, error: Exception | None) -> Finding:
    """A node that was asked and did not answer, or could not."""
    if error is None:
        found = f"no answer within {NODE_TIMEOUT_S:.0f} s"
        return Finding("cluster", name, "fail", found, f"look whether {name} is alive (`ray list nodes`) and at Ray's logs there, or take it out")  # fmt: skip
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    last = lines[-1] if hasattr(error, "cause") else lines[0]  # Ray puts the node's traceback before it
    return Finding("cluster", name, "fail", f"could not be checked: {last:.300}", "install the same plad-dist there as here; look at Ray's logs there")  # fmt: skip


def alike(mine: Mapping[str, str], theirs: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Nodes with other versions than this machine's."""
    for name, found in theirs.items():
        other = [
            f"{package} {found.get(package, 'is missing')} ({mine.get(package, 'missing')} here)"
            for package in sorted(mine.keys() | found.keys())
            if found.get(package) != mine.get(package)
        ]
        if other:
            yield Finding("same versions", name, "fail", ", ".join(other), "use one image, or one lock, on all nodes")
        else:
            yield Finding("same versions", name, "ok", f"as on {HERE}")


def clock(name: str, readings: Sequence[Reading]) -> Finding:
    """How far a node's clock is from this machine's, by the reading that took the shortest way."""
    if not readings:
        return Finding(
            "clock", name, "fail", f"no answer within {CLOCK_TIMEOUT_S:.0f} s", f"look at Ray's logs on {name}"
        )
    asked, there, answered = min(readings, key=lambda reading: reading[2] - reading[0])
    skew, error = there - (asked + answered) / 2, (answered - asked) / 2
    least = max(0.0, abs(skew) - error)
    found = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} {HERE} (to {error:.1f} s)"
    remedy = f"let {name} keep its time by NTP (chrony, systemd-timesyncd)"
    if least > CLOCK_WARN_S:
        return Finding("clock", name, "fail" if least > CLOCK_FAIL_S else "warn", found, remedy)
    return Finding("clock", name, "ok", f"as on {HERE}, to {max(CLOCK_WARN_S, error):.0f} s")


# -------------------------------------------------------------------------------------------------------------- config


def _fit(config: Config, cluster: Hardware | None = None) -> Iterator[Finding]:
    """Whether what the config takes is there: memory of devices and nodes, and disk.

    Args:
        cluster: None where there is none: this machine may be one that the run is only submitted from.
    """
    try:
        hardware = cluster or hardware_here()
        problems = check_fits(config, hardware)
    except UserError as error:  # the run goes on too
        yield warn(f"cannot be planned: {error}", "see `plad plan`, or measure")
        return
    if problems and cluster is None:
        yield warn(f"this machine cannot run it: {problems[0].what}", "name a cluster by --address, or see `plad plan`")
    else:
        for problem in problems:
            yield (fail if problem.always else warn)(problem.what, "; or ".join(problem.remedies))
    if not problems:
        yield ok(f"memory for every stage, on {hardware.name}")
    root, work = RunDir.of(config).storage.local_root, workload_of(config)
    if root is None or (root / RUN_FILE).exists():  # begun: a part of it is there already
        return
    kinds = disk_bytes(config, work, sizes_of(config, hardware.device), hardware.device)
    if config.training.checkpoint_url is not None:
        del kinds["checkpoints"]
    takes = sum(kinds.values())
    there = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    more = "" if work.prompts is not None else ", prompts and samples not counted"
    if takes > free:
        yield warn(
            f"run.dir: the whole run takes {size(takes)} of disk{more}, {size(free)} are free at {there}",
            "free some, use another place, or lower keep_checkpoints of the phases, whose checkpoints take most",
        )
    else:
        yield ok(f"run.dir: {size(takes)} of disk for the whole run{more}, {size(free)} are free")


def config_findings(config: Config) -> list[Finding]:
    """What the config names: its inputs, and how its models' tokenizers, templates and embeddings agree."""
    inputs = list(findings_of("inputs", HERE, partial(_inputs, config)))
    refused = [key for key, _ in _models_of(config) if any(item.found.startswith(f"{key}.path: ") for item in inputs)]
    return [*inputs, *findings_of("models", HERE, partial(_agreement, config, refused))]


def _inputs(config: Config) -> Iterator[Finding]:
    from plad_dist.preflight import check_inputs

    try:
        check_inputs(config, RunDir.of(config))
    except (UserError, RunFailed) as error:
        for problem in problems_of(str(error)):
            yield fail(problem, _CORRECT)
    else:
        yield ok("prompts, models, arguments and run directory are there and fit together")


def problems_of(message: str) -> list[str]:
    """The problems in one message: those of a list each by itself, with the indented lines that follow it."""
    first, _, rest = message.partition("\n")
    return re.split(r"\n(?!\s)", rest) if re.fullmatch(r"\d+ problems:", first) else [message]


def _agreement(config: Config, refused: Sequence[str]) -> Iterator[Finding]:
    from plad_dist.data.templates import Renderer

    identities = {}
    for key, model in _models_of(config):
        if model.scratch is not None:
            yield ok(f"{key}: made by the run, with a tokenizer of {model.scratch.vocab_size:,} tokens")
        elif model.path is not None and key not in refused:
            try:
                renderer = Renderer(model.path, model)
                yield from _model(key, model.path, model, renderer)
            except UserError as error:
                yield fail(f"{key}.path: {error}", _CORRECT)
            else:
                identities[key] = renderer.identity
    student = identities.get("student")
    for key, identity in identities.items():
        if student is not None and identity != student and key.startswith("teacher"):
            yield ok(f"{key} has another tokenizer than the student: its responses are encoded anew with the student's")


def _model(key: str, path: str, model: Model, renderer: Any) -> Iterator[Finding]:
    """Whether a model has embeddings for all that its tokenizer and its template may write."""
    from plad_dist.data.models import load_model_config, vocabulary_size
    from plad_dist.training.plan import check_vocabulary

    embeddings, tokenizer = vocabulary_size(load_model_config(path, model)), renderer.tokenizer
    check_vocabulary(path, renderer, embeddings)
    known = set(tokenizer.get_vocab().values())
    prompt = renderer.prompt_ids([[{"role": "user", "content": "Hello"}]])[0]
    bos = tokenizer.bos_token_id
    if ends := sorted(token for token in renderer.end_ids if token not in known or token >= embeddings):
        yield fail(
            f"{key}: ends responses with the tokens {ends}, which are not in its tokenizer or have no embeddings",
            "correct eos_token_id in its generation_config.json and tokenizer_config.json",
        )
    if missing := sorted({token for token in prompt if token >= embeddings}):
        yield fail(
            f"{key}: its template writes the tokens {missing}, and the model has {embeddings:,} embeddings",
            "use the template and the tokenizer that belong to the model",
        )
    if bos is not None and prompt[:2] == [bos, bos]:
        yield warn(
            f"{key}: its prompts begin with {tokenizer.bos_token} twice",
            f"take it out of the template: set {key}.template, or correct the tokenizer's chat template",
        )
    padded = f", padded to {embeddings:,}" if embeddings > len(tokenizer) else ""
    own = "its own chat template" if model.template is None else "the config's template"
    if not ends and not missing:
        yield ok(f"{key}: tokenizer of {len(tokenizer):,} tokens{padded}; {own}; ends with {sorted(renderer.end_ids)}")


# --------------------------------------------------------------------------------------------------------------- table


def folded(findings: Sequence[Finding]) -> list[Finding]:
    """Findings by check, in order; what is well alike on several nodes in one line."""
    checks = list(dict.fromkeys(finding.check for finding in findings))
    nodes: dict[Finding, list[str]] = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: checks.index(finding.check)):
        nodes[finding if finding.state != "ok" else replace(finding, node="")].append(finding.node)
    return [replace(finding, node=_together(where)) for finding, where in nodes.items()]


def _together(nodes: Sequence[str]) -> str:
    others = [name for name in nodes if name != HERE]
    several = [f"{len(others)} nodes"] if len(others) > 1 else others
    return ", ".join([HERE] * (HERE in nodes) + several)


def findings_table(findings: Sequence[Finding]) -> Table:
    """One line for each finding; those that are alike on several nodes folded."""
    table = Table("check", "node", "state", "what was found", "remedy")
    for finding in folded(findings):
        state = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(finding.check, Text(finding.node), state, Text(finding.found), Text(finding.remedy))
    return table


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    failed, warned = (sum(finding.state == state for finding in findings) for state in ("fail", "warn"))
    if not failed and not warned:
        return "All is well."
    fails = f"{failed} failed" if failed else "Nothing failed"
    return f"{fails}, {warned} warning{'s' * (warned != 1)}."
