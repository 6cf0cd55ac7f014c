"""Everything about a run's inputs that can be known to be wrong before a process is started."""

from __future__ import annotations

from plad_dist.config import Config, Model
from plad_dist.data.models import check_local_model, check_weights, load_model_config
from plad_dist.data.prompts import check_prompts, train_prompts
from plad_dist.data.templates import Renderer
from plad_dist.rundir import RunDir, check_same_run
from plad_dist.sampling.engine import check_engine_args


def check_inputs(config: Config, run: RunDir, *, all_rows: bool = False, command: str | None = None) -> None:
    """Raise :class:`UserError` for the first thing that is wrong. Writes nothing.

    Args:
        all_rows: read every prompt; otherwise the first of each source, since `prepare` reads them all.
        command: the one that is to run; empty for all. Those that make no model need no file system.
    """
    from plad_dist.pairing.scores import check_scorer
    from plad_dist.training.deepspeed_config import check_deepspeed, load_deepspeed
    from plad_dist.training.trackers import check_trackers

    if command not in ("prepare", "sample", "pair"):
        _ = run.root
    check_same_run(config, run)
    load_deepspeed(config.training.deepspeed)
    check_trackers(config.training.trackers)
    for role, wanted in (("teacher", config.sampling.teacher), ("student", config.sampling.student)):
        check_engine_args(wanted.engine, f"sampling.{role}.engine")
    for name, teacher in config.teachers.items():
        if teacher.sampling:
            check_engine_args(teacher.sampling.engine, f"teachers.{name}.sampling.engine")
    models = {
        f"teachers.{name}" if config.teachers else name: teacher for name, teacher in config.all_teachers().items()
    }
    check_scorer(config.pairing)
    for model in (*models.values(), config.student):
        if model.path is not None:
            check_local_model(model.path)
    if train_prompts(run.storage).manifest() is not None:
        return  # what follows was checked when the run began
    check_deepspeed(config.training.deepspeed)
    check_prompts(config, all_rows=False)
    for teacher in models.values():
        _check_model(teacher)
    _check_model(config.student)
    if all_rows:
        check_prompts(config, all_rows=True)  # with the tokenizers of the models, which are there


def _check_model(model: Model) -> None:
    if model.endpoint is not None:
        return
    if model.scratch is not None:
        from plad_dist.training.scratch import check_architecture

        check_architecture(model.scratch)
    else:
        assert model.path is not None
        load_model_config(model.path, model)
        Renderer(model.path, model)
        check_weights(model.path)
