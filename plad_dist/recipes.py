"""Recipes: the steps that make the products of a run, and the config keys that decide each.

A run may resume with a changed config as long as no recipe that depends on the change has started.
A run may reuse a product of another run if no difference between the two configs decides the
product or its inputs. Both rules read this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from plad_dist.config import is_operational


@dataclass(frozen=True)
class Recipe:
    """Step that makes some products of a run.

    Attributes:
        name: what the step makes, as it is logged.
        command: `plad` command that carries the step out.
        order: position among the steps; independent steps may share one.
        sections: config sections that decide the products. Of all sections of the table that
            contain a key, only the most specific one counts.
        traces: paths in the run directory, one of which exists as soon as the step has started.
        can_withdraw: the step can remove what it has committed, so that a folder in which nothing
            is committed is no trace.
        datasets: datasets of the step, whose first parts are looked for by name, because the
            listing of a folder can be stale.
    """

    name: str
    command: str
    order: int
    sections: tuple[str, ...]
    traces: tuple[str, ...]
    can_withdraw: bool = False
    datasets: tuple[str, ...] = ()


def _phase_traces(phase: str) -> tuple[str, ...]:
    return f"checkpoints/{phase}", f"events/{phase}"


# Operational keys that nevertheless change a model: quantised weights lead to another student, and
# a collapse ends a round at another checkpoint.
_DECISIVE_OPERATIONAL = ("training.deepspeed", "training.watch")
_ALL_PHASES = (
    "training.dtype",
    "training.lora",
    "training.router_aux_loss",
    "training.max_group_tokens",
    "training.over_long",
    "training.deepspeed",
)
_ALL_ROLES = ("sampling", "evaluation.decodings", "evaluation.limit")

# The tokenizers of the models measure the prompts, so the sections of the models decide the prompts
# and, through them, everything. The layers of a cut student do not change its tokenizer. A teacher
# that writes rejected responses has no share of the prompts.
PROMPTS = Recipe(
    "prompts",
    "prepare",
    order=0,
    sections=("run", "prompts", "teacher", "teachers", "student", "sampling.rejected.teacher"),
    traces=("prompts", "eval/prompts"),
    can_withdraw=True,
    datasets=("prompts", "eval/prompts"),
)
TEACHER = Recipe(
    "teacher",
    "train",
    order=1,
    sections=("training.teacher", *_ALL_PHASES),
    traces=("models", *_phase_traces("teacher")),
)
STUDENT = Recipe("student", "train", order=1, sections=("student.from.layers",), traces=("models/student-init",))
WARMUP = Recipe(
    "warmup",
    "train",
    order=1,
    sections=("training.warmup", *_ALL_PHASES),
    traces=("models", *_phase_traces("warmup")),
)
TEACHER_SAMPLES = Recipe(
    "teacher samples",
    "sample",
    order=2,
    sections=("sampling.teacher", *_ALL_ROLES),
    traces=("samples",),
    datasets=("samples/teacher/round-0",),
)
REJECTED_SAMPLES = Recipe(
    "rejected samples",
    "sample",
    order=2,
    sections=("sampling.rejected", "sampling.student", *_ALL_ROLES),
    traces=("samples",),
    datasets=("samples/student/round-0",),
)
# Responses of the warm-up student for the evaluation.
STUDENT_SAMPLES = Recipe(
    "student samples",
    "sample",
    order=2,
    sections=("sampling.student", "evaluation.candidates", "evaluation.warmup_temperatures", *_ALL_ROLES),
    traces=("eval/round-0/samples/warmup", "eval/round-0/candidates"),
)
PAIRS = Recipe("pairs", "pair", order=3, sections=("pairing",), traces=("pairs",), datasets=("pairs/round-0",))
ROUND = Recipe(
    "round",
    "train",
    order=4,
    sections=("training.round", "training.heldout_pairs", "training.watch", *_ALL_PHASES),
    traces=_phase_traces("round-0"),
)
CONTROL = Recipe("seqkd", "train", order=5, sections=("training.seqkd", *_ALL_PHASES), traces=_phase_traces("seqkd"))
EVALUATION = Recipe(
    "evaluation",
    "evaluate",
    order=6,
    sections=("evaluation",),
    traces=("eval/round-0/metrics.json",),
)
RECIPES = (
    PROMPTS, TEACHER, STUDENT, WARMUP, TEACHER_SAMPLES, REJECTED_SAMPLES, STUDENT_SAMPLES, PAIRS, ROUND, CONTROL,
    EVALUATION,
)  # fmt: skip
_SECTIONS = frozenset(section for recipe in RECIPES for section in recipe.sections)


def section_of(key: str) -> str | None:
    """Return the most specific section of the table that contains a key, or None."""
    parts = key.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in _SECTIONS), None)


def recipes_decided_by(key: str) -> tuple[Recipe, ...]:
    """Return the recipes whose products a config key decides directly.

    A key of no section counts as a key of the first recipe, on which all others depend.
    """
    section = section_of(key)
    return tuple(recipe for recipe in RECIPES if section in recipe.sections) or (PROMPTS,)


def is_decisive(key: str) -> bool:
    """Return True if a config key decides a product of a run."""
    return not is_operational(key) or section_of(key) in _DECISIVE_OPERATIONAL
