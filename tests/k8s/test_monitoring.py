"""The dashboard and the alerts use metrics that the code exports, and alerts tell what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.metrics import Counter, Histogram

from plad_dist.fleet.metrics import FLEET
from plad_dist.prometheus import RUN
from plad_dist.training.driver.metrics import TRAINING
from tests.k8s.rendered import OVERLAYS, cluster_of, of_kind, render_on_top

FOLDER = Path("k8s/components/monitoring")
METRICS = FLEET | TRAINING | RUN


def exported() -> set[str]:
    """Return the names of all metrics as Prometheus stores them."""
    names = set()
    for name, (kind, _) in METRICS.items():
        endings = ["_total"] if kind is Counter else ["_bucket", "_sum", "_count"] if kind is Histogram else [""]
        names |= {f"ray_plad_{name}{ending}" for ending in endings}
    return names


def queried(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\bray_plad_\w+", text)}


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return board


RUNBOOK = Path("docs/runbook.md").read_text()


def alerts() -> list[dict[str, Any]]:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    return [rule for group in rules["spec"]["groups"] for rule in group["rules"]]


def test_every_metric_of_the_dashboard_is_exported_and_every_exported_one_is_shown() -> None:
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    assert queried(expressions) <= exported()
    shown = {name for name in METRICS if any(f"ray_plad_{name}" in text for text in expressions)}
    assert shown == set(METRICS)


def test_every_metric_of_the_alerts_is_exported() -> None:
    assert queried([rule["expr"] for rule in alerts()]) <= exported()


def test_alerts_cover_the_known_faults_and_tell_what_to_do() -> None:
    rules = {rule["alert"]: rule for rule in alerts()}
    assert set(rules) >= {
        "PladRunFailed", "PladNoProgress", "PladErrorRows", "PladDiverged", "PladManyRecoveries", "PladEnginesDie",
        "PladDiskFills",
    }  # fmt: skip
    for rule in rules.values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > 60
        assert rule["alert"] in RUNBOOK


def test_panels_do_not_overlap_and_have_titles_and_descriptions() -> None:
    covered: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        area = panel["gridPos"]
        cells = {(area["x"] + x, area["y"] + y) for x in range(area["w"]) for y in range(area["h"])}
        assert not cells & covered, panel["title"]
        covered |= cells
        assert panel["title"]
        assert panel["type"] == "row" or panel["description"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_head_and_workers_of_every_overlay_are_scraped(overlay: str, tmp_path: Path) -> None:
    objects = render_on_top(overlay, ["monitoring"], tmp_path)
    (monitor,) = of_kind(objects, "PodMonitor")
    selected, (endpoint,) = monitor["spec"]["selector"]["matchLabels"], monitor["spec"]["podMetricsEndpoints"]
    cluster = cluster_of(objects)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]
        assert selected.items() <= pod["metadata"]["labels"].items()
        ports = [port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])]
        assert endpoint["port"] in ports
    boards = [
        item for item in of_kind(objects, "ConfigMap") if item["metadata"].get("labels", {}).get("grafana_dashboard")
    ]
    assert len(boards) == 1
