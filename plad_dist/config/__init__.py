"""Validated schema of a run's config, and the only place where defaults are defined.

A run is a YAML file with these sections. ``key.sub=value`` arguments override its keys
(:mod:`plad_dist.config_file`).
"""

from plad_dist.config.evaluation import Evaluation, LlmJudge, RewardJudge, TeacherJudge
from plad_dist.config.models import CutModel, Endpoint, Model, Pretrained, ScratchModel, Student
from plad_dist.config.pairing import Pairing, RewardModel
from plad_dist.config.prompts import Columns, DatasetSource, FilesSource, Prompts, PythonFunctionsSource
from plad_dist.config.root import (
    Config,
    RespondingModel,
    flatten,
    is_operational,
    operational_keys,
    optional_sections,
    path_keys,
    schema_fields,
)
from plad_dist.config.run import Cluster, Rounds, Run
from plad_dist.config.sampling import Decoding, Rejected, RoleSampling, Sampling, Teacher
from plad_dist.config.section import OPERATIONAL, Section
from plad_dist.config.training import CollapseBounds, Lora, Loss, MlePhase, Optimizer, Phase, Training, Warmup

__all__ = [
    "OPERATIONAL",
    "Cluster",
    "CollapseBounds",
    "Columns",
    "Config",
    "CutModel",
    "DatasetSource",
    "Decoding",
    "Endpoint",
    "Evaluation",
    "FilesSource",
    "LlmJudge",
    "Lora",
    "Loss",
    "MlePhase",
    "Model",
    "Optimizer",
    "Pairing",
    "Phase",
    "Pretrained",
    "Prompts",
    "PythonFunctionsSource",
    "Rejected",
    "RespondingModel",
    "RewardJudge",
    "RewardModel",
    "RoleSampling",
    "Rounds",
    "Run",
    "Sampling",
    "ScratchModel",
    "Section",
    "Student",
    "Teacher",
    "TeacherJudge",
    "Training",
    "Warmup",
    "flatten",
    "is_operational",
    "operational_keys",
    "optional_sections",
    "path_keys",
    "schema_fields",
]
