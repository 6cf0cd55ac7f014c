"""`plad plan`: the examples fit, and the command reports what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plad_dist.planning.plan import choose_hardware, plan_run
from plad_dist.study import load_runs
from tests.conftest import in_this_process

# The models of packages-smollm2 are made on the machine that runs it.
EXAMPLES = sorted(path for path in Path("examples").glob("*.yaml") if path.stem != "packages-smollm2")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_fits_the_hardware_that_it_names(path: Path) -> None:
    for _, config in load_runs(str(path), []):
        plan = plan_run(config, choose_hardware(None, None, 8, config), price=2.0)
        assert plan["fits"], plan["problems"]
        json.dumps(plan, allow_nan=False)


def test_the_command_reports_what_does_not_fit_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*arguments: str) -> tuple[int, str, str]:
        return in_this_process(monkeypatch, capsys, "plan", *arguments)

    code, out, err = plan("examples/qwen-72b-to-7b.yaml", "--gpu", "l4-24g", "training.num_workers=8")
    assert code == 1
    assert "Does not fit: training of Qwen/Qwen2.5-7B-Instruct (7.6B)" in out
    assert "Traceback" not in err
    code, out, _ = plan("examples/ablation.yaml", "--json")
    assert code == 0
    assert set(json.loads(out)["variants"]) >= {"rank", "dpo"}
    assert plan("examples/quickstart.yaml", "--price", "inf")[0] == 2
    code, _, err = plan("examples/quickstart.yaml", "--gpu", "h900")
    assert (code, "--gpu 'h900': not known; expected one of" in err) == (2, True)
