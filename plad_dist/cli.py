"""The `plad` command: reads the arguments, calls the pipeline, turns errors into messages and exit codes."""

from __future__ import annotations

import json
import logging
import math
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from plad_dist import __version__
from plad_dist.config import Config
from plad_dist.config_file import load_config
from plad_dist.errors import RunFailed, UserError

if TYPE_CHECKING:
    from plad_dist.evaluation.comparison import Comparison
    from plad_dist.evaluation.document import Metrics
    from plad_dist.jobs import JobServer
    from plad_dist.rundir import RunDir

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    help="Distil a large language model into a smaller one by preference, on a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config keys to set, such as run.seed=3.")
]
Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, such as http://host:8265. Empty: RAY_API_SERVER_ADDRESS, else this machine's."
    ),
]
JobName = Annotated[str | None, typer.Argument(metavar="[JOB]", help="Empty: the newest one.")]


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed run, 2 bad input, 130 interrupted."""
    _log_to_terminal()
    try:
        app()
    except UserError as error:
        _fail(f"plad: {error}", BAD_INPUT)
    except RunFailed as error:
        _fail(f"plad: failed: {error}", FAILED)


def _log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("plad")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _fail(message: str, code: int) -> NoReturn:
    for handler in logging.getLogger("plad").handlers:
        if isinstance(handler, logging.FileHandler):  # the run's own log keeps it
            handler.handle(logging.makeLogRecord({"msg": message, "levelname": "ERROR", "levelno": logging.ERROR}))
    sys.stderr.write(f"\n{message}\n")
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"plad-dist {__version__}")
        raise typer.Exit


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run all stages. Resumes where a run was left; skips what is committed."""
    from plad_dist.evaluation.rounds import last_round
    from plad_dist.pipeline import finished_metrics

    settings = load_config(config, overrides or [])
    last = last_round(settings, _pipeline(settings))
    _show(finished_metrics(last), str(last.root / last.report))


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Read the prompts into the run directory."""
    _stage("prepare", config, overrides)


@app.command()
def sample(config: ConfigPath, overrides: Overrides = None) -> None:
    """Sample the teacher and the student."""
    _stage("sample", config, overrides)


@app.command()
def pair(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build pseudo-preference pairs from the samples."""
    _stage("pair", config, overrides)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    phase: Annotated[str | None, typer.Option(help="Only this phase: teacher, warmup, round-0, ... or seqkd.")] = None,
) -> None:
    """Train the phases that are not trained yet, in order."""
    _stage("train", config, overrides, phase)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Let every system answer the held-out prompts, compare them and write the report."""
    _stage("evaluate", config, overrides)


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the report anew from the figures."""
    from plad_dist.evaluation.report.stage import write_report
    from plad_dist.evaluation.rounds import last_round
    from plad_dist.rundir import RunDir, check_same_run

    settings = load_config(config, overrides or [])
    directory = RunDir.of(settings)
    check_same_run(settings, directory)
    typer.echo(write_report(settings, last_round(settings, directory)))


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    stage: Annotated[str, typer.Option(help="sample, pair, train, evaluate, or distill for all.")] = "distill",
    follow: Annotated[bool, typer.Option("--follow", help="Show what the job says, and end as it ends.")] = False,
) -> None:
    """Submit a run to a Ray cluster as a job. Submitted again, it goes on where it was left."""
    from plad_dist.jobs import STAGES, JobServer, load_submitted

    wanted = next((name for name in STAGES if name == stage), None)
    if wanted is None:
        raise UserError(f"--stage {stage}: expected one of {', '.join(STAGES)}")
    settings = load_submitted(config, overrides or [])
    server = JobServer(address)
    job = server.submit(settings, config, overrides or [], wanted)
    typer.echo(f"Submitted: {job}")
    if follow:
        _follow(server, job)
    else:
        typer.echo(f"`plad logs {job} --follow` shows it, `plad stop {job}` ends it")


@app.command()
def status(
    what: Annotated[
        str | None, typer.Argument(metavar="[RUN_DIR or JOB]", help="A run directory, or a job. Empty: all jobs.")
    ] = None,
    address: Address = None,
) -> None:
    """What of a run is committed, or how jobs on a cluster stand."""
    from pathlib import Path

    is_job = what is None or address is not None or what.startswith(("plad-", "raysubmit_"))
    if what is not None and (not is_job or Path(what).is_dir()):
        from plad_dist.status import status_table

        _print(status_table(what))
        return
    from plad_dist.jobs import JobServer, job_table

    server = JobServer(address)
    jobs = server.jobs() if what is None else [server.job(what)]
    _print(job_table(jobs, server.address))
    if what is not None and jobs[0].message:
        typer.echo(str(jobs[0].message).strip())


@app.command()
def logs(
    job: JobName = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until it has ended; end as it ends.")] = False,
) -> None:
    """What a job says."""
    from plad_dist.jobs import JobServer

    server = JobServer(address)
    name = job or server.newest()
    if follow:
        _follow(server, name)
    else:
        typer.echo(server.logs(name), nl=False)


@app.command()
def stop(job: JobName = None, address: Address = None) -> None:
    """End a job. What it has committed is kept."""
    from plad_dist.jobs import JobServer

    server = JobServer(address)
    name = job or server.newest()
    typer.echo(f"{name}: {server.stop(name)}. What was committed is kept; submit the same config again to go on")


def _follow(server: JobServer, job: str) -> None:
    try:
        state = server.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        _fail(
            f"plad: {job} goes on without being watched; `plad logs {job} --follow` shows it, `plad stop {job}` ends it",
            INTERRUPTED,
        )
    if state == "STOPPED":
        raise RunFailed(f"{job} was stopped. What was committed is kept; submit the same config again to go on")
    if state != "SUCCEEDED":
        code = server.job(job).driver_exit_code
        raise (UserError if code == BAD_INPUT else RunFailed)(f"{job}: {state}; what it said last is above")


@app.command()
def verify(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory: path or URI.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Set aside what is bad, so that the next run makes it anew.")
    ] = False,
) -> None:
    """Check every part of a run against its manifest: missing, surplus, truncated, altered. Reads every byte.

    Models are checked by their headers. Exit code 0 where nothing is wrong or all was repaired, 1 otherwise. Repair while no
    other command works on the run directory.
    """
    from plad_dist.verify.verification import Verification, verify_table

    verification = Verification(run_dir)
    _print(verify_table(run_dir, verification.datasets))
    typer.echo(verification.summary())
    if repair and (repaired := verification.repair()):
        typer.echo(repaired)
    verification.raise_for_problems(repaired=repair)


@app.command()
def compare(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="Finished runs.")],
    output: Annotated[
        str | None, typer.Option(metavar="PAGE.html", help="Also write a page, and its figures as JSON beside it.")
    ] = None,
    decoding: Annotated[
        str | None, typer.Option(help="A decoding of the runs, such as greedy. Empty: the main one, which is sampled.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Compare the students of several runs on the held-out prompts that all have answered."""
    from plad_dist.evaluation.comparison import check_output, compare_runs

    if output is not None:
        check_output(output)
    _compared(compare_runs(run_dirs, decoding), output, as_json)


@app.command()
def study(
    file: Annotated[str, typer.Argument(metavar="STUDY.yaml", help="A config and its variants.")],
    overrides: Overrides = None,
) -> None:
    """Run all variants of a config and compare them. What variants have in common is made once; resumes where it was left."""
    from plad_dist.evaluation.comparison import compare_runs
    from plad_dist.evaluation.over_seeds import study_over_seeds
    from plad_dist.evaluation.report.tables import seeds_table
    from plad_dist.reuse import take_over
    from plad_dist.rundir import RunDir
    from plad_dist.study import load_study

    seeds: list[dict[str, str]] = []
    for runs in load_study(file, overrides or []):
        done: list[Config] = []
        for _, config in runs:
            take_over(config, done)
            _pipeline(config)
            done.append(config)
        folder = RunDir.of(done[0]).root.parent
        _compared(compare_runs([config.run.dir for config in done]), str(folder / "compare.html"))
        seeds.append({name: config.run.dir for name, config in runs})
    if len(seeds) > 1:
        variants, figures = study_over_seeds(seeds), folder.parent / "study.json"
        figures.write_text(json.dumps([variant.to_json() for variant in variants], indent=1), encoding="utf-8")
        _print(seeds_table(variants))
        typer.echo(f"\nAll figures: {figures}")


@app.command()
def push(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the hub; made if it is not there.")],
    phase: Annotated[
        str | None, typer.Option(help="Whose model: teacher, warmup, round-0, seqkd. Empty: the last round's.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is seen by all.")] = False,
) -> None:
    """Upload a finished model with its card to a hub. The token comes from HF_TOKEN, another hub from HF_ENDPOINT."""
    from plad_dist.push import push as upload

    typer.echo(f"Pushed: {upload(run_dir, repo, phase, public=public)}")


def _compared(comparison: Comparison, output: str | None, as_json: bool = False) -> None:
    from pathlib import Path

    from plad_dist.evaluation.comparison import write_comparison
    from plad_dist.evaluation.report.tables import comparison_table

    if output is not None:
        write_comparison(comparison, Path(output))
    if as_json:
        typer.echo(json.dumps(comparison.to_json()))
        return
    _print(comparison_table(comparison))
    if output is not None:
        typer.echo(f"\nReport: {output}")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config and the inputs that it names, without starting or writing anything."""
    from plad_dist.preflight import check_inputs
    from plad_dist.rundir import RunDir

    settings = load_config(config, overrides or [])
    check_inputs(settings, RunDir.of(settings), all_rows=True)
    typer.echo(f"{config}: valid; fingerprint {settings.fingerprint()[:12]}, run directory {settings.run.dir}")


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="The run's YAML file. Empty: only the machines are checked."),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster, such as auto or host:6379. Empty: the config's, else RAY_ADDRESS, else none."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine, every node of a cluster and what a config names. Exit code 0 where nothing failed, 1 otherwise."""
    from dataclasses import asdict

    from plad_dist.doctor.examine import examine, findings_table, summary

    settings = load_config(config, overrides or []) if config is not None else None
    try:
        findings = examine(settings, address)
    except KeyboardInterrupt:
        _fail("plad: interrupted. Nothing was changed.", INTERRUPTED)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        _print(findings_table(findings))
        typer.echo(summary(findings))
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(FAILED)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Kind of GPU, such as h100-80g; cpu: machines as this. Empty: the GPUs here, else this machine where it fits, else h100-80g."
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes. Empty: as many as are needed.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Empty: those here, else 8.")] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of the data set; sampling.limit bounds those that are sampled.")
    ] = None,
    prompt_tokens: Annotated[float | None, typer.Option(min=1, help="Mean length of a prompt.")] = None,
    response_tokens: Annotated[float | None, typer.Option(min=1, help="Mean length of a response.")] = None,
    teacher_rate: Annotated[float | None, typer.Option(min=0.001, help="Tokens a second and device, measured.")] = None,
    student_rate: Annotated[float | None, typer.Option(min=0.001, help="The same, of the student's engines.")] = None,
    train_rate: Annotated[float | None, typer.Option(min=0.001, help="The same, of training.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device for an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Memory part by part, disk, time and money of a run, without starting anything. Exit code 1 where it does not fit.

    Of a study, its variants.
    """
    from plad_dist.planning.fit import hardware_of
    from plad_dist.planning.plan import plan_run
    from plad_dist.planning.table import plan_lines, plan_tables
    from plad_dist.preflight import check_engines
    from plad_dist.study import load_runs

    given = {"teacher": teacher_rate, "student": student_rate, "train": train_rate}
    for option, value in {
        "price": price,
        "prompt-tokens": prompt_tokens,
        "response-tokens": response_tokens,
        **{f"{name}-rate": rate for name, rate in given.items()},
    }.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{option} {value}: expected a finite number")
    rates = {name: rate for name, rate in given.items() if rate is not None}
    plans = {}
    for name, settings in load_runs(config, overrides or []):
        check_engines(settings)
        hardware = hardware_of(gpu, nodes, gpus_per_node, settings)
        plans[name] = plan_run(
            settings, hardware, prompts=prompts, prompt_tokens=prompt_tokens, response_tokens=response_tokens, rates=rates, price=price
        )  # fmt: skip
        if not as_json:
            for table in plan_tables(name, plans[name]):
                _print(table)
            typer.echo("\n".join(plan_lines(plans[name])) + "\n")
    fits = all(found["fits"] for found in plans.values())
    if as_json:
        typer.echo(json.dumps(plans.get(config, {"fits": fits, "variants": plans})))
    if not fits:
        raise typer.Exit(FAILED)


def _stage(command: str, config: str, overrides: list[str] | None, phase: str | None = None) -> None:
    settings: Config = load_config(config, overrides or [])
    if phase is not None:
        from plad_dist.phases import phase_names

        if phase not in phase_names(settings):
            raise UserError(f"--phase {phase}: this config has the phases {', '.join(phase_names(settings))}")
    _pipeline(settings, command, phase)


def _pipeline(config: Config, command: str | None = None, phase: str | None = None) -> RunDir:
    from plad_dist.pipeline import run_pipeline

    try:
        return run_pipeline(config, command, phase)
    except KeyboardInterrupt:
        _fail("plad: interrupted. What was committed is kept; run the same command again to go on.", INTERRUPTED)


def _show(metrics: Metrics, report: str) -> None:
    from plad_dist.evaluation.report.tables import metrics_table

    _print(metrics_table(metrics))
    for sentence in metrics.verdict:
        typer.echo(f"- {sentence}")
    typer.echo(f"\nReport: {report}")


def _print(table: object) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
