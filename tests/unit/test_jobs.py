"""Jobs without a cluster: logs are shown once, bad configs and addresses are refused at once."""

from __future__ import annotations

import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from plad_dist.config_file import load_config, read_yaml
from plad_dist.errors import UserError
from plad_dist.jobs import JobServer, _Log, _next_name, job_table, load_submitted, submitted_document


def test_a_log_that_is_sent_again_is_shown_once() -> None:
    shown: list[str] = []
    log = _Log(shown.append)
    for pieces in (["one\ntwo\n"], ["one\n", "two\nth"], [], ["one\ntwo\nthree\n", "four\n"]):
        log.restart()
        for piece in pieces:
            log.add(piece)
    assert "".join(shown) == "one\ntwo\nthree\nfour\n"


def test_the_table_shows_jobs_without_metadata() -> None:
    jobs = [SimpleNamespace(submission_id="raysubmit_1", status="RUNNING", metadata=None, start_time=None)]
    assert job_table(jobs, "http://host:8265").row_count == 1


@pytest.mark.parametrize("override", ["run.sed=3", "run.dir=relative/folder"])
def test_a_bad_config_is_refused_without_a_cluster(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_submitted("examples/quickstart.yaml", [override])
    assert load_submitted("examples/quickstart.yaml", ["run.dir=/mnt/run"]).run.dir == "/mnt/run"


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.yaml")), ids=lambda path: path.name)
def test_a_submitted_config_has_the_overrides_and_the_expanded_paths(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "variants" in read_yaml(path):
        pytest.skip("a study is not submitted")
    monkeypatch.setenv("SCRATCH", "/mnt/scratch")
    config = load_submitted(str(path), ["run.dir=$SCRATCH/a$$b", "run.seed=3"])
    monkeypatch.delenv("SCRATCH")
    (tmp_path / "run.yaml").write_text(submitted_document(config))
    assert load_config(tmp_path / "run.yaml") == config
    assert config.run.dir == "/mnt/scratch/a$b"


def test_the_address_of_another_server_is_refused(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="is no Ray dashboard"):
            JobServer(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "said",
    ["/runs/[/x]", "[link=http://evil.example]/runs/mine[/link]", "\x1b]0;owned\x07/runs/x", "/runs/exp[lr]", ":smile:",
     "a\nfake row", "x" * 100_000, None, 5, ["a"], {"a": "b"}, True],
)  # fmt: skip
def test_what_others_say_of_their_jobs_cannot_break_or_forge_the_table(said: object) -> None:
    jobs = [
        SimpleNamespace(submission_id=said, status=said, start_time=said, metadata={"run_dir": said, "stage": said}),
        SimpleNamespace(submission_id="plad-x-1", status="RUNNING", start_time=10**400, metadata=said),
        SimpleNamespace(submission_id="plad-x-2", status="RUNNING", start_time=-1, metadata={}),
    ]
    output = io.StringIO()
    table = job_table(jobs, str(said)[:50])
    Console(file=output, width=4000, force_terminal=True, color_system=None).print(table)
    text = output.getvalue()
    assert "\x1b" not in text
    assert table.row_count == 3
    if isinstance(said, str) and said.startswith("/runs"):
        assert said in text
    assert len(text) < 100_000


def test_names_of_others_do_not_break_the_next_name() -> None:
    assert _next_name("/runs/x", ["plad-x-1", "plad-x-²", f"plad-x-{'9' * 5000}", "-", ""]).endswith("-2")
