"""Everything about a run's inputs that can be known to be wrong before a process is started."""

from __future__ import annotations

from plad_dist.config import Config, FilesSource, Model
from plad_dist.data.models import check_local_model, check_weights, load_model_config
from plad_dist.data.prompts import check_files, train_prompts
from plad_dist.data.templates import Renderer
from plad_dist.rundir import RunDir, check_same_run
from plad_dist.sampling.engine import check_engine_args


def check_inputs(config: Config, run: RunDir, *, all_rows: bool = False) -> None:
    """Raise :class:`UserError` for the first thing that is wrong. Writes nothing.

    Args:
        all_rows: read every row of the prompt files; otherwise the first of each, since `prepare` reads all before it
            writes any.
    """
    from plad_dist.training.deepspeed_config import load_deepspeed

    _ = run.root
    check_same_run(config, run)
    load_deepspeed(config.training.deepspeed)
    for role, wanted in (("teacher", config.sampling.teacher), ("student", config.sampling.student)):
        check_engine_args(wanted.engine, f"sampling.{role}.engine")
    for name, teacher in config.teachers.items():
        if teacher.sampling:
            check_engine_args(teacher.sampling.engine, f"teachers.{name}.sampling.engine")
    models = {
        f"teachers.{name}" if config.teachers else name: teacher for name, teacher in config.all_teachers().items()
    }
    for model in (*models.values(), config.student):
        if model.path is not None:
            check_local_model(model.path)
    if train_prompts(run.storage).manifest() is not None:
        return  # what follows was checked when the run began
    for source in (config.prompts.source, config.prompts.heldout):
        if isinstance(source, FilesSource):
            check_files(source, all_rows=all_rows)
    for name, teacher in models.items():
        _check_model(name, teacher, trained=config.training.teacher is not None)
    _check_model("student", config.student, trained=True)


def _check_model(role: str, model: Model, *, trained: bool) -> None:
    from plad_dist.training.policy import check_trainable

    if model.endpoint is not None:
        return
    if model.scratch is not None:
        from plad_dist.training.scratch import check_architecture

        architecture = check_architecture(model.scratch)
    else:
        assert model.path is not None
        architecture = load_model_config(model.path, model)
        Renderer(model.path, model)
        check_weights(model.path)
    if trained:
        check_trainable(architecture, role)
