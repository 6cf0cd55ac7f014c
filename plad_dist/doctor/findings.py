"""Findings of `plad doctor`: each is the result of one check on one node, with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from plad_dist.devices import GIB
from plad_dist.errors import first_line

MIB = 1 << 20


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        check: name of the check.
        node: where the check ran.
        state: `ok`; `warn` if a run works, but worse than it could; `fail` if a run will fail.
        text: the result in words, without secrets.
        remedy: what to do; empty if nothing is to be done.
    """

    check: str
    node: str
    state: Literal["ok", "warn", "fail"]
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the finding as a JSON object; its text has the key `found`."""
        return {
            "check": self.check, "node": self.node, "state": self.state, "found": self.text, "remedy": self.remedy
        }  # fmt: skip


def ok(text: str) -> Finding:
    """Return a finding that needs no action. :func:`run_check` fills in check and node."""
    return Finding("", "", "ok", text)


def warn(text: str, remedy: str) -> Finding:
    """Return a finding with which a run works, but worse than it could."""
    return Finding("", "", "warn", text, remedy)


def fail(text: str, remedy: str) -> Finding:
    """Return a finding with which a run will fail."""
    return Finding("", "", "fail", text, remedy)


def run_check(name: str, node: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. A check that raises yields a failure, so that the next checks
    still run.

    Args:
        name, node: filled in where a finding has no check and no node.
    """
    try:
        for finding in check():
            yield replace(finding, check=finding.check or name, node=finding.node or node)
    except Exception as error:  # noqa: BLE001 - no fault of a check stops the doctor
        text = f"could not be checked: {type(error).__name__}: {first_line(error):.300}"
        yield Finding(name, node, "fail", text, "fix the cause that the message names, then run the doctor again")


def format_size(size: float) -> str:
    """Return a number of bytes in GiB or MiB."""
    if size >= 10 * GIB:
        return f"{size / GIB:,.0f} GiB"
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
