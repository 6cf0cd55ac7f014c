"""The ledger: money that a payer has spent and may be spending, kept in storage for good.

A payer is a model behind a server: a teacher, the student or a judge of a run. Its ledger is a
folder of numbered objects, ``spending/<payer>/00000001.json`` and so on. Each is created only if it
is absent, and holds the whole state after one change: the money that is settled, and an amount for
each holder, which is the most that the holder may have spent so far. A holder is a client
(:mod:`plad_dist.sampling.endpoint.account`) or a batch in flight. A client raises its amount before
it sends requests, and settles it at the real cost when it stops. A holder that was killed keeps its
amount for good, because it may have been billed for it.

Settled money and amounts together never exceed the cap, whatever number of commands are at work and
wherever they are killed. No object is ever deleted or overwritten: a writer that was frozen, or
reads an old listing, still finds every later object by its number.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from plad_dist.data.dataset import Dataset
from plad_dist.data.sealed import sealed_json, unsealed_json
from plad_dist.data.storage import Storage
from plad_dist.errors import RunFailed
from plad_dist.sampling.endpoint.batch_record import open_batches
from plad_dist.sampling.spool import total_cost

FOLDER = "spending"
MICROS = 1_000_000  # money is stored in millionths, integers that add up exactly
_NAME = re.compile(r"(\d{8,})\.json")
_MAX_REFUSALS = 100  # in a row, each because another process was faster
_ROUNDING = 1e-3  # part of a millionth that may come from sums of floating-point numbers


@dataclass(frozen=True)
class Spending:
    """State of a ledger, in millionths.

    Attributes:
        settled: money that was spent, at its real cost as far as it is known.
        open: by holder, the most that it may have spent so far.
        excess: largest cost of a request beyond the amount that it had reserved.
    """

    settled: int = 0
    open: Mapping[str, int] = field(default_factory=dict)
    excess: int = 0

    @property
    def total(self) -> int:
        """Money that was spent or may have been."""
        return self.settled + sum(self.open.values())

    def with_amount(self, holder: str, amount: int) -> Spending:
        """Return the state with another amount of a holder."""
        return replace(self, open={**self.open, holder: amount})

    def with_settled(self, holder: str, cost: int) -> Spending:
        """Return the state with the real cost of a holder, unless it was settled before."""
        if holder not in self.open:
            return self
        others = {name: amount for name, amount in self.open.items() if name != holder}
        return replace(self, settled=self.settled + cost, open=others)


class Ledger:
    """The ledger of one payer.

    Args:
        payer: role and name of the model.
    """

    def __init__(self, storage: Storage, payer: str) -> None:
        self.storage, self._folder = storage, f"{FOLDER}/{payer}"
        self._number, self._state = 0, Spending()
        self._lock = threading.Lock()  # a call in a thread outlives the task that was cancelled

    def start(self, spent: Callable[[], Spending]) -> None:
        """Write the first state of a new ledger.

        Args:
            spent: returns what was spent before there was a ledger.
        """
        with self._lock:
            self._read()
            if not self._number:
                self.storage.create(self._key(1), _encode(spent()))
                self._read()

    def read(self) -> Spending:
        """Return the latest state.

        Raises:
            RunFailed: an object cannot be read, or is damaged.
        """
        with self._lock:
            return self._read()

    def _read(self) -> Spending:
        if not self._number:
            sizes = self.storage.sizes(self._folder)
            number = max((int(match[1]) for name in sizes if (match := _NAME.fullmatch(name))), default=0)
            if number:
                self._number, self._state = number, self._decode(number, self.storage.read(self._key(number)))
        # A listing may be old, and other processes write meanwhile.
        while (data := self.storage.read(self._key(self._number + 1))) is not None:
            self._number, self._state = self._number + 1, self._decode(self._number + 1, data)
        return self._state

    def change(self, edit: Callable[[Spending], Spending]) -> Spending:
        """Write an edited state, and return the latest one.

        Args:
            edit: returns the new state for the latest one. It is called again if another process
                was faster, and perhaps for a state that it has returned itself, because the reply
                to a write was lost.

        Raises:
            RunFailed: the storage failed. The change may have been written or not.
        """
        with self._lock:
            for _ in range(_MAX_REFUSALS):
                state = self._read()
                edited = edit(state)
                if edited == state:
                    return state
                if self.storage.create(self._key(self._number + 1), _encode(edited)):
                    self._number, self._state = self._number + 1, edited
                    return edited
        raise RunFailed(
            f"{self.storage.url}/{self._key(self._number + 1)}: cannot be created, although it does not exist. Nothing "
            "more is sent. What is committed is kept; run again when the storage works"
        )

    def _key(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"

    def _decode(self, number: int, data: bytes | None) -> Spending:
        try:
            return Spending(**unsealed_json(data or b""))
        except (ValueError, TypeError):
            raise RunFailed(
                f"{self.storage.url}/{self._key(number)}: missing, or not a ledger of money. Nothing more is sent. "
                "Restore it, or delete it and every later object if they are the ones that were damaged"
            ) from None


def spending_of_run(storage: Storage) -> dict[str, Spending]:
    """Return the money of every payer of a run that has a ledger."""
    return {payer: Ledger(storage, payer).read() for payer in _payers(storage)}


def ledger_problems(storage: Storage) -> list[str]:
    """Return what is wrong with the latest states of a run's ledgers; earlier ones are not used."""
    problems = []
    for payer in _payers(storage):
        try:
            Ledger(storage, payer).read()
        except RunFailed as error:
            problems.append(str(error))
    return problems


def _payers(storage: Storage) -> list[str]:
    return sorted(name.rstrip("/") for name in storage.sizes(FOLDER) if name.endswith("/"))


def spent_before(outputs: Sequence[tuple[Dataset, Collection[int]]]) -> Spending:
    """Return the first state of a ledger: what blocks of datasets have cost according to storage.

    Each batch in flight is a holder.

    Args:
        outputs: datasets, each with the blocks that count.
    """
    settled, batches = 0, dict[str, int]()
    for dataset, blocks in outputs:
        manifest = dataset.manifest()
        if manifest is not None:
            parts = dict(enumerate(manifest.parts))
        else:
            parts = dataset.committed_parts()
            settled += to_micros(total_cost(dataset, blocks))
            batches |= {record.holder: to_micros(record.worst_cost) for record in open_batches(dataset, blocks)}
        settled += sum(parts[block].counts.get("cost_micros", 0) for block in blocks if block in parts)
    return Spending(settled, batches)


def to_micros(money: float) -> int:
    """Return money in millionths, rounded up."""
    return max(0, math.ceil(money * MICROS - _ROUNDING))


def _encode(state: Spending) -> bytes:
    return sealed_json(json.dumps({"settled": state.settled, "open": dict(state.open), "excess": state.excess}))
