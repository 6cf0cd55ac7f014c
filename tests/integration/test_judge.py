"""A judge behind a server, asked through the real pool: every question once, whatever is run again or raised later."""

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


class Judge:
    """A server that prefers the answer with `splendid` in it, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._up = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        assert self._up.wait(30)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/v1/models", self._models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._up.set()
        await asyncio.Event().wait()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def _answer(self, request: web.Request) -> web.Response:
        text = (await request.json())["messages"][-1]["content"]
        self.asked[text] += 1
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


def config_of(folder: Path, server: Judge, limit: int, **more: Any) -> Any:
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
    raw["evaluation"]["judges"] = {"reader": {"type": "llm", "limit": limit, "model": model, **more}}
    return parse_config(raw, "test")


def test_a_judge_is_asked_every_question_once(tmp_path: Path, local_ray: None) -> None:
    write_prompts(tmp_path)
    server = Judge()
    config = config_of(tmp_path, server, 120)
    run = open_run(config)
    prepare(config, run.storage)
    prompts = heldout_prompts(run.storage).read().to_pylist()[:200]
    good = [Output(f"splendid {number}", 2, True) for number in range(len(prompts))]
    bad = [Output(f"awful {number}", 2, True) for number in range(len(prompts))]

    def judged(config: Any) -> Any:
        responses = {(PLAD, WARMUP): (good, bad), (PLAD, SEQKD): (good, bad)}
        return ask_judge(config, run, "reader", config.evaluation.judges["reader"], prompts, responses, Progress())

    found = judged(config)
    assert found[PLAD, WARMUP].wins[:120].tolist() == [1.0] * 120
    assert (found[PLAD, SEQKD].prompts_asked, len(found[PLAD, SEQKD].wins)) == (120, 200)
    assert set(server.asked.values()) == {1}, "two systems that say the same are one question"
    assert server.asked.total() == 240

    judged(config)
    assert server.asked.total() == 240, "run again, nothing is asked"
    judged(config_of(tmp_path, server, 200))
    assert server.asked.total() == 240 + 2 * 100, "a raised limit asks only the chunk that has grown"
    spent = sum(
        part.counts["cost_micros"]
        for answers in judge_answers(run, "reader")
        for part in answers.committed_parts().values()
    )
    assert spent == server.asked.total() * 15

    judged(config_of(tmp_path, server, 120, sampling={"temperature": 0.5}))
    assert server.asked.total() == 440 + 240, "a judge that is asked otherwise is another judge"
