"""The `plad` command line: parses arguments, prints results, and maps errors to exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from plad_dist import __version__
from plad_dist.cli_arguments import (
    Address,
    AsJson,
    ConfigPath,
    Follow,
    JobName,
    MeanTokens,
    Overrides,
    Rate,
    RunDirPath,
    expanded,
    finite,
    run_directory,
)
from plad_dist.config import Config
from plad_dist.config_file import load_config
from plad_dist.errors import RunFailed, UserError
from plad_dist.progress import Progress
from plad_dist.terminal import exit_with, log_to_terminal, print_comparison, print_metrics, print_table, print_times
from plad_dist.timeline import Activity

if TYPE_CHECKING:
    from plad_dist.jobs import JobServer
    from plad_dist.rundir import RunDir

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Distil a large language model into a smaller one by preference, on a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed run, 2 bad input, 130 interrupted."""
    log_to_terminal()
    try:
        app()
    except UserError as error:
        exit_with(f"plad: {error}", BAD_INPUT)
    except RunFailed as error:
        exit_with(f"plad: failed: {error}", FAILED)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"plad-dist {__version__}")
        raise typer.Exit


# -- stages of a run


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run all stages. Resumes an interrupted run and skips what is committed."""
    from plad_dist.evaluation.rounds import last_round
    from plad_dist.pipeline import finished_metrics

    settings = load_config(config, overrides or [])
    last = last_round(settings, _run_pipeline(settings))
    print_times(last)
    print_metrics(finished_metrics(last), str(last.root / last.report))


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Read the prompts into the run directory."""
    _run_stage("prepare", config, overrides)


@app.command()
def sample(config: ConfigPath, overrides: Overrides = None) -> None:
    """Sample the teacher and the student."""
    _run_stage("sample", config, overrides)


@app.command()
def pair(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build pseudo-preference pairs from the samples."""
    _run_stage("pair", config, overrides)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    phase: Annotated[str | None, typer.Option(help="Only this phase: teacher, warmup, round-0, ... or seqkd.")] = None,
) -> None:
    """Train the phases that are not trained yet, in order."""
    _run_stage("train", config, overrides, phase)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Sample every system on the held-out prompts, compare the systems, and write the report."""
    _run_stage("evaluate", config, overrides)


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Rewrite the report from the stored metrics."""
    from plad_dist.evaluation.report.stage import write_report
    from plad_dist.evaluation.rounds import last_round
    from plad_dist.rundir import RunDir, check_same_run

    settings = load_config(config, overrides or [])
    directory = RunDir.of(settings)
    check_same_run(settings, directory)
    typer.echo(write_report(settings, last_round(settings, directory)))


def _run_stage(command: str, config: str, overrides: list[str] | None, phase: str | None = None) -> None:
    settings = load_config(config, overrides or [])
    if phase is not None:
        from plad_dist.phases import phase_names

        if phase not in phase_names(settings):
            raise UserError(f"--phase {phase}: this config has the phases {', '.join(phase_names(settings))}")
    _run_pipeline(settings, command, phase)


def _run_pipeline(config: Config, command: str | None = None, phase: str | None = None) -> RunDir:
    # A new environment has no compiled modules yet, and takes long to import them.
    with Progress(every_s=6.0).timed("imports", Activity.STARTING):
        from plad_dist.pipeline import run_pipeline

    try:
        return run_pipeline(config, command, phase)
    except KeyboardInterrupt:
        exit_with("plad: interrupted. Committed results are kept; run the same command again to resume.", INTERRUPTED)


# -- jobs on a cluster


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    stage: Annotated[str, typer.Option(help="sample, pair, train, evaluate, or distill for all stages.")] = "distill",
    follow: Follow = False,
) -> None:
    """Submit a run to a Ray cluster as a job. A run that is submitted again resumes."""
    from plad_dist.jobs import JobServer, check_stage, load_submitted

    job_stage = check_stage(stage)
    settings = load_submitted(config, overrides or [])
    server = JobServer(address)
    job = server.submit(settings, job_stage)
    typer.echo(f"Submitted: {job}")
    if follow:
        _follow(server, job)
    else:
        typer.echo(f"`plad logs {job} --follow` shows its log, `plad stop {job}` ends it")


@app.command()
def status(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN_DIR or JOB]",
            callback=run_directory,
            help="A run directory, or the name of a job. Default: all jobs.",
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Show which parts of a run are committed, or the state of jobs on a cluster."""
    from plad_dist.jobs import JobServer, is_run_dir, job_table

    if target is not None and is_run_dir(target, address):
        from plad_dist.status import status_table

        print_table(status_table(target))
        return
    server = JobServer(address)
    jobs = server.jobs() if target is None else [server.job(target)]
    print_table(job_table(jobs, server.address))
    if target is not None and jobs[0].message:
        typer.echo(str(jobs[0].message).strip())


@app.command()
def logs(
    job: JobName = None,
    address: Address = None,
    follow: Follow = False,
) -> None:
    """Show the log of a job."""
    from plad_dist.jobs import JobServer

    server = JobServer(address)
    name = job or server.newest()
    if follow:
        _follow(server, name)
    else:
        typer.echo(server.logs(name), nl=False)


@app.command()
def stop(job: JobName = None, address: Address = None) -> None:
    """Stop a job. Results that it has committed are kept."""
    from plad_dist.jobs import JobServer

    server = JobServer(address)
    name = job or server.newest()
    typer.echo(f"{name}: {server.stop(name)}. Committed results are kept; submit the same config again to resume")


def _follow(server: JobServer, job: str) -> None:
    try:
        server.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        exit_with(
            f"plad: {job} continues in the background; `plad logs {job} --follow` shows its log, `plad stop {job}` "
            "ends it",
            INTERRUPTED,
        )


# -- finished runs


@app.command()
def verify(
    run_dir: RunDirPath,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set bad parts and checkpoints aside, so that the next run redoes them.")
    ] = False,
) -> None:
    """Check every part of a run against its manifest: missing, surplus, truncated, altered.

    Reads every byte. Exits with 0 if nothing is wrong or
    everything was repaired, otherwise with 1. A repair ends the command that works on the run, if
    there is one.
    """
    from plad_dist.verify.verification import Verification, verify_table

    verification = Verification(run_dir)
    print_table(verify_table(run_dir, verification.datasets))
    typer.echo(verification.summary())
    if repair and (repaired := verification.repair()):
        typer.echo(repaired)
    verification.raise_for_problems(repaired=repair)


@app.command()
def compare(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", callback=run_directory, help="Finished runs.")],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="PAGE.html", callback=expanded, help="Also write a page, and the figures as JSON beside it."
        ),
    ] = None,
    decoding: Annotated[
        str | None,
        typer.Option(help="A decoding of the runs, such as greedy. Default: the main decoding, usually sampled."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the systems of several runs on the held-out prompts that the runs have in common."""
    from plad_dist.evaluation.comparison import check_output, compare_runs

    if output is not None:
        check_output(output)
    print_comparison(compare_runs(run_dirs, decoding), output, as_json)


@app.command()
def study(
    file: Annotated[
        str, typer.Argument(metavar="STUDY.yaml", callback=expanded, help="A base config, its variants and seeds.")
    ],
    overrides: Overrides = None,
) -> None:
    """Run all variants of a config, do their common work once, and compare them.

    Resumes an interrupted study.
    """
    from plad_dist.evaluation.report.tables import seeds_table
    from plad_dist.study import load_study, run_variants, write_figures_over_seeds

    seeds = load_study(file, overrides or [])
    for runs in seeds:
        comparison, folder = run_variants(runs, _run_pipeline)
        print_comparison(comparison, str(folder / "compare.html"))
    if len(seeds) > 1:
        variants, path = write_figures_over_seeds(seeds)
        print_table(seeds_table(variants))
        typer.echo(f"\nAll figures: {path}")


@app.command()
def push(
    run_dir: RunDirPath,
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created if it does not exist.")
    ],
    phase: Annotated[
        str | None,
        typer.Option(help="Phase whose model to push: teacher, warmup, round-0, seqkd. Default: the last round."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Upload a finished model with its card to a hub.

    HF_TOKEN holds the token, HF_ENDPOINT names another hub.
    """
    from plad_dist.push import push as upload

    typer.echo(f"Pushed: {upload(run_dir, repo, phase, public=public)}")


# -- checks before a run


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config and the inputs that it names. Starts and writes nothing."""
    from plad_dist.preflight import check_inputs
    from plad_dist.rundir import RunDir

    settings = load_config(config, overrides or [])
    check_inputs(settings, RunDir.of(settings), all_rows=True)
    typer.echo(f"{config}: valid; fingerprint {settings.fingerprint()[:12]}, run directory {settings.run.dir}")


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", callback=expanded, help="YAML file of the run. Default: only the machines are checked."
        ),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, such as auto or host:6379. Default: the config's, or else RAY_ADDRESS, or else none."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, every node of a cluster, and what a config names.

    Exits with 1 if a check failed.
    """
    from plad_dist.doctor.examine import examine
    from plad_dist.doctor.report import findings_json, findings_table, has_failed, summary

    settings = load_config(config, overrides or []) if config is not None else None
    try:
        findings = examine(settings, address)
    except KeyboardInterrupt:
        exit_with("plad: interrupted. Nothing was changed.", INTERRUPTED)
    if as_json:
        typer.echo(findings_json(findings))
    else:
        print_table(findings_table(findings))
        typer.echo(summary(findings))
    if has_failed(findings):
        raise typer.Exit(FAILED)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Kind of GPU, such as h100-80g, or cpu for machines like this one. Default: the GPUs of this machine, "
            "or else this machine if the config fits it, or else h100-80g."
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes. Default: as many as needed.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Default: as on this machine, or else 8.")] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of the data set. At most sampling.limit of them are sampled.")
    ] = None,
    prompt_tokens: MeanTokens = None,
    response_tokens: MeanTokens = None,
    teacher_rate: Rate = None,
    student_rate: Rate = None,
    train_rate: Rate = None,
    price: Annotated[float | None, typer.Option(min=0, callback=finite, help="Price of a device per hour.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run's memory, disk, time and cost, without starting anything.

    Exits with 1 if the run does not fit. For a study, all of its variants are planned.
    """
    from plad_dist.planning.plan import choose_hardware, plan_run
    from plad_dist.planning.tables import plan_notes, plan_tables
    from plad_dist.preflight import check_engines
    from plad_dist.study import load_runs

    measured = {"teacher": teacher_rate, "student": student_rate, "train": train_rate}
    rates = {name: rate for name, rate in measured.items() if rate is not None}
    plans = {}
    for name, settings in load_runs(config, overrides or []):
        check_engines(settings)
        plans[name] = plan_run(
            settings,
            choose_hardware(gpu, nodes, gpus_per_node, settings),
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            rates=rates,
            price=price,
        )
        if not as_json:
            for table in plan_tables(name, plans[name]):
                print_table(table)
            typer.echo("\n".join(plan_notes(plans[name])) + "\n")
    fits = all(variant["fits"] for variant in plans.values())
    if as_json:
        typer.echo(json.dumps(plans.get(config, {"fits": fits, "variants": plans})))
    if not fits:
        raise typer.Exit(FAILED)
