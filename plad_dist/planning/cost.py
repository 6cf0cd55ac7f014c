"""Cost of a run: devices and endpoints."""

from __future__ import annotations

import math

from plad_dist.config import Config
from plad_dist.planning.engines import EndpointSpec, endpoint_specs
from plad_dist.planning.problem import Problem
from plad_dist.planning.workload import Workload


def estimate_cost(
    config: Config, work: Workload, device_hours: float | None, price: float | None
) -> dict[str, float] | None:
    """Return the cost of devices and of endpoints with known prices, or None without any price.

    Args:
        device_hours: None if they are unknown.
        price: of a device per hour.
    """
    cost: dict[str, float] = {}
    if device_hours is not None and price is not None:
        cost["devices"] = round(price * device_hours, 2)
    for spec in endpoint_specs(config) if work.sampled_prompts is not None else ():
        requests = work.sampled_responses(config, spec.role) + work.heldout_responses(config, spec.role)
        if (spent := _endpoint_cost(spec, work, requests * spec.share)) is not None:
            cost[f"endpoint {spec.name}"] = round(spent, 2)
    return cost or None


def _endpoint_cost(spec: EndpointSpec, work: Workload, requests: float) -> float | None:
    """Return the cost of an endpoint, or None if it has no prices.

    Each response is counted with its prompt, as if it were a request of its own.
    """
    endpoint = spec.endpoint
    if endpoint.input_price is None or endpoint.output_price is None:
        return None
    per_request = work.prompt_tokens * endpoint.input_price + work.response_tokens[spec.role] * endpoint.output_price
    return requests * per_request / 1e6


def overspending(config: Config, cost: dict[str, float]) -> list[Problem]:
    """Return a problem for each endpoint whose spending limit would stop its stage early."""
    problems = []
    for spec in endpoint_specs(config):
        limit, spent = spec.endpoint.max_spend, cost.get(f"endpoint {spec.name}", 0.0)
        if limit is not None and spent > limit:
            description = (
                f"{spec.label}.endpoint.max_spend: {limit:,.2f}: the responses cost about {spent:,.2f}, so the stage "
                "would stop"
            )
            remedies = (f"{spec.label}.endpoint.max_spend={math.ceil(spent)}", "a smaller sampling.limit")
            problems.append(Problem(description, remedies, always=False))
    return problems
