"""Verification of a run directory: it holds what its manifests list, complete and unaltered."""

from __future__ import annotations

from plad_dist.catalog import DatasetEntry, ModelEntry, products_of, stored_rounds
from plad_dist.data.sealed import seal_problem
from plad_dist.rundir import RUN_FILE, RunDir, load_run
from plad_dist.sampling.endpoint.ledger import ledger_problems
from plad_dist.verify.contents import check_inputs, check_rows
from plad_dist.verify.models import check_checkpoints, check_figures, check_models
from plad_dist.verify.parts import check_datasets
from plad_dist.verify.result import CheckResult


def verify(url: str) -> tuple[list[CheckResult], list[str]]:
    """Check every dataset of a run directory by reading every byte. Write nothing.

    Returns:
        The state of every dataset and of the checkpoints of every phase, and other problems of the
        run directory.

    Raises:
        UserError: the path is not a run directory.
    """
    stored, run = load_run(url), RunDir.at(url)
    config, problems = stored.config, []
    if config.fingerprint() != stored.fingerprint:
        problems.append(
            f"{RUN_FILE}: its fingerprint is not that of its config: one of the two was altered. Restore the file"
        )
    elif (problem := seal_problem(run.storage.read(RUN_FILE) or b"")) is not None:
        problems.append(
            f"{RUN_FILE}: {problem}: it was altered, though not in what decides the data. Restore it from a copy; the "
            "next command that works on the run also writes it again"
        )
    rounds = stored_rounds(config, run)
    products = list(products_of(config, run, rounds))
    entries = {product.path: product for product in products if isinstance(product, DatasetEntry)}
    models = [product for product in products if isinstance(product, ModelEntry)]
    datasets = check_datasets(run.storage, entries)
    check_inputs(datasets, set(entries))
    check_rows(datasets)
    for result in datasets:
        result.state = "damaged" if result.problems else result.state
    phases = [model.phase for model in models if model.phase is not None]
    checkpoints = check_checkpoints(run.checkpoints(config), phases)
    problems += [*check_models(run, models), *check_figures(run, rounds), *ledger_problems(run.storage)]
    return [*datasets, *checkpoints], problems
