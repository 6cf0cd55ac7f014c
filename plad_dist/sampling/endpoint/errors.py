"""The errors that end a client's work, with messages that tell the user what to do."""

from __future__ import annotations

from datetime import datetime, timedelta

from plad_dist.config import Endpoint
from plad_dist.errors import UserError
from plad_dist.sampling.endpoint.budget import Budget
from plad_dist.sampling.endpoint.credentials import key_source
from plad_dist.sampling.endpoint.outage import Outage
from plad_dist.sampling.endpoint.reply import CERTIFICATE, Failure

KEPT = "Responses received so far are kept"


class EndpointStoppedError(RuntimeError):
    """The client sends nothing more, although key and address are right.

    Attributes:
        cost: what failed tries of the prompt cost, or may have cost.
    """

    cost = 0.0


class EndpointDownError(EndpointStoppedError):
    """No request succeeded for `give_up_after_s`, or the server asks for a longer pause."""


class SpendingCapReached(EndpointStoppedError):
    """The next request could exceed `max_spend`."""


class ClientClosedError(EndpointStoppedError):
    """The client was closed before the request was sent."""


class SpendingStoppedError(EndpointStoppedError):
    """The ledger of money cannot be written, or another command has taken over."""


class EndpointBlockedError(UserError):
    """No request succeeds before the user corrects the key, the address, the model or the account.

    Attributes:
        cost: what failed tries of the prompt cost, or may have cost.
    """

    cost = 0.0


def endpoint_down(endpoint: Endpoint, outage: Outage, pause_s: float, now: float) -> EndpointDownError:
    """Return the error for an outage that lasts too long, or else a pause that is too long.

    Args:
        pause_s: rest of the pause that the server asks for.
    """
    if outage.remaining_s(now) > 0:
        cause = f"the server asks for a pause of {pause_s:.0f} s"
    else:
        lasted_s = outage.duration_s(now)
        since = datetime.now().astimezone() - timedelta(seconds=lasted_s)
        cause = f"no response since {since:%Y-%m-%d %H:%M:%S} ({lasted_s:.0f} s, {outage.failures} failures)"
    return EndpointDownError(
        f"{endpoint.url}: {cause}; the last failure: {outage.last_failure}. {KEPT}; run again when the server works, "
        "or raise endpoint.give_up_after_s."
    )


def spending_cap_reached(endpoint: Endpoint, budget: Budget, worst_cost: float) -> SpendingCapReached:
    """Return the error for a request whose worst cost exceeds the rest of the budget."""
    assumed = (
        f", {budget.assumed:.4g} of it assumed for {budget.lost_requests} requests whose response was lost"
        if budget.lost_requests
        else ""
    )
    held = (
        f", {budget.held_elsewhere:.4g} of it held by batches in flight, by another command or by one that was killed "
        "and may have been billed"
        if budget.held_elsewhere
        else ""
    )
    return SpendingCapReached(
        f"{endpoint.url}: {budget.spent:.6g} of {budget.cap:g} spent{assumed}{held}; the next request may cost up to "
        f"{worst_cost + budget.excess:.4g}. {KEPT}; raise endpoint.max_spend to continue."
    )


def field_remedy(failure: Failure) -> str | None:
    """Return what to set if a server refuses a field that other servers take, None for other
    failures."""
    if failure.status not in (400, 422):
        return None
    if "max_completion_tokens" in failure.text:
        return (
            "Set endpoint.extra_body to {max_tokens: null, max_completion_tokens: N}, with the max_tokens of the "
            "model's sampling as N."
        )
    if "temperature" in failure.text.lower():
        return (
            "Every decoding of evaluation.decodings is sent to a teacher, and a greedy one by default: set "
            "temperatures that the server takes in evaluation.decodings and in the model's sampling, or "
            "endpoint.extra_body to {temperature: null}."
        )
    return None


def blocked_message(endpoint: Endpoint, failure: Failure) -> str:
    """Return the message of :class:`EndpointBlockedError`."""
    return f"{advice(endpoint, failure)} {KEPT}; run again after that."


def advice(endpoint: Endpoint, failure: Failure) -> str:
    """Return what is wrong with an endpoint, and what the user must correct."""
    detail = f"({failure.text})"
    match failure.status:
        case 401 | 403 if source := key_source(endpoint):
            problem = f"the server rejects the key from {source} {detail}. Set a key that may use the model."
        case 401 | 403:
            problem = (
                f"the server requires a key {detail}. Name its source in endpoint.api_key_env, api_key_file or "
                "api_key_command."
            )
        case status if status == CERTIFICATE:
            problem = f"{failure.text}. Set endpoint.ca_bundle to a file with the certificates to trust."
        case 402 | 429:
            problem = f"the account at the server is exhausted {detail}. Check its billing and its limits."
        case 404 | 405 | 410:
            problem = (
                f"no model {endpoint.model!r}, or no such API at this address {detail}. Correct endpoint.model or "
                "endpoint.url."
            )
        case status if 300 <= status < 400:
            problem = (
                f"the server redirects {detail}, and the key must not follow. Set endpoint.url to the final address."
            )
        case 200:
            problem = f"{failure.text}. Remove endpoint.max_spend, or use a server that reports usage."
        case 400 | 422 if remedy := field_remedy(failure):
            problem = f"the server refuses a field of the request {detail}. {remedy}"
        case status if 400 <= status < 500:
            problem = (
                f"the server refuses even a short prompt {detail}. Correct sampling.*, endpoint.model or "
                "endpoint.extra_body."
            )
        case _:
            problem = f"the server cannot be used {detail}. Start it, or correct endpoint.url."
    return f"{endpoint.url}: {problem}"
