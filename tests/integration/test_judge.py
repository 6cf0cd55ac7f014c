"""A judge behind a server, on the real fleet: reruns and raised limits repeat no question."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from aiohttp import web

from plad_dist.config_file import parse_config
from plad_dist.data.prompts import heldout_prompts, prepare
from plad_dist.evaluation.judges import ask_judge, judge_answers
from plad_dist.progress import Progress
from plad_dist.rundir import open_run
from plad_dist.systems import PLAD, SEQKD, WARMUP
from plad_dist.text_metrics import Output
from tests.conftest import tiny_config, write_prompts

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


class JudgeServer:
    """Server that prefers the response with `splendid` in it, and counts its questions."""

    def __init__(self) -> None:
        self.questions: Counter[str] = Counter()
        self._is_listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        assert self._is_listening.wait(30)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._judge)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._is_listening.set()
        await asyncio.Event().wait()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def _judge(self, request: web.Request) -> web.Response:
        text = (await request.json())["messages"][-1]["content"]
        self.questions[text] += 1
        verdict = "[[A]]" if text.index("splendid") < text.index("awful") else "[[B]]"
        return web.json_response(
            {
                "choices": [{"message": {"content": f"So: {verdict}"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5},
            }
        )


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config_of(folder: Path, server: JudgeServer, limit: int, **settings: Any) -> Any:
    raw = tiny_config(folder)
    raw["prompts"]["heldout_fraction"] = 0.5
    model = {
        "endpoint": {
            "url": f"http://127.0.0.1:{server.port}/v1",
            "model": "judge",
            "input_price": 1.0,
            "output_price": 1.0,
        }
    }
    raw["evaluation"]["judges"] = {"reader": {"type": "llm", "limit": limit, "model": model, **settings}}
    return parse_config(raw, "test")


def test_a_judge_gets_every_question_once(tmp_path: Path, local_ray: None) -> None:
    write_prompts(tmp_path)
    server = JudgeServer()
    config = config_of(tmp_path, server, 120)
    run = open_run(config)
    prepare(config, run.storage)
    prompts = heldout_prompts(run.storage).read().to_pylist()[:200]
    good = [Output(f"splendid {number}", 2, True) for number in range(len(prompts))]
    bad = [Output(f"awful {number}", 2, True) for number in range(len(prompts))]

    def judge(config: Any) -> Any:
        responses = {(PLAD, WARMUP): (good, bad), (PLAD, SEQKD): (good, bad)}
        return ask_judge(config, run, "reader", config.evaluation.judges["reader"], prompts, responses, Progress())

    preferences = judge(config)
    assert preferences[PLAD, WARMUP].wins[:120].tolist() == [1.0] * 120
    assert (preferences[PLAD, SEQKD].prompts_asked, len(preferences[PLAD, SEQKD].wins)) == (120, 200)
    assert set(server.questions.values()) == {1}, "two systems with the same response are one question"
    assert server.questions.total() == 240

    judge(config)
    assert server.questions.total() == 240, "a rerun sends no question"
    judge(config_of(tmp_path, server, 200))
    assert server.questions.total() == 240 + 2 * 100, (
        "a raised limit sends only the questions of the chunk that has grown"
    )
    spent = sum(
        part.counts["cost_micros"]
        for answers in judge_answers(run, "reader")
        for part in answers.committed_parts().values()
    )
    assert spent == server.questions.total() * 15

    judge(config_of(tmp_path, server, 120, sampling={"temperature": 0.5}))
    assert server.questions.total() == 440 + 240, "a judge with other sampling parameters is another judge"
