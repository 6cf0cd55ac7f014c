"""Assumptions about other libraries fail at import with both versions."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from plad_dist.compat.assumptions import Assumptions

INSTALLED = importlib.metadata.version("ray")


def test_assumptions_that_hold_pass() -> None:
    assumptions = Assumptions("ray", "2.60.0")
    assert assumptions.attribute(json, "dumps") is json.dumps
    assumptions.parameters(Assumptions.attribute, "self", "owner", "name")
    assumptions.value(json.__name__, "json", "the name")


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda assumptions: assumptions.attribute(json, "no_such_name"), "json has no no_such_name"),
        (lambda assumptions: assumptions.parameters(Assumptions.value, "self"), r"value takes .*expected \(self\)"),
        (lambda assumptions: assumptions.value("a", "b", "KEY"), "KEY is 'a', expected 'b'"),
    ],
)
def test_a_broken_assumption_names_the_problem_and_both_versions(broken: object, problem: str) -> None:
    with pytest.raises(ImportError, match=rf"ray {INSTALLED}: .*{problem}.*written for ray 1\.2\.3"):
        broken(Assumptions("ray", "1.2.3"))  # type: ignore[operator]
