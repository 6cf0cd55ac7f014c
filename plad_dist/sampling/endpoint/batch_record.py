"""Records of batches in storage: what was submitted to a provider, and what of it is settled.

A record is written before its batch is submitted. It has a token, which the batch carries in its
metadata, and the name of the file of requests. By either the batch is found again wherever the
process ends: nothing is submitted twice. The records of a block lie in its folder of the spool and
are deleted with it.

Of several processes at one block, only the one that has claimed it last submits
(:mod:`plad_dist.data.claims`). It claims the block before it reads the records, and looks at the
claims after it has written the name of the file and before it submits: a record without that name
was therefore submitted by nobody.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from plad_dist.data.claims import SupersededError, is_superseded, read_claim, take_claim
from plad_dist.data.dataset import Dataset
from plad_dist.data.storage import Claim
from plad_dist.errors import RunFailed
from plad_dist.sampling.backend import SampleNumber
from plad_dist.sampling.spool import FOLDER, uncommitted_folders

_NAME = re.compile(r"batch-(\d{4})\.json")


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch of a block.

    Attributes:
        number: number of the batch in its block.
        token: value of `plad` in the metadata of the batch.
        fingerprint: fingerprint of the samples.
        keys: row and `sample_index` of the samples that the batch asks for.
        worst_cost: largest cost of the batch.
        file_id: the provider's name of the uploaded requests, None before the upload is complete.
        batch_id: the provider's name of the batch, None before the answer to its submission.
        is_settled: True once its results are in the spool.
    """

    number: int
    token: str
    fingerprint: str
    keys: tuple[SampleNumber, ...]
    worst_cost: float
    file_id: str | None = None
    batch_id: str | None = None
    is_settled: bool = False

    @property
    def holder(self) -> str:
        """Name of the batch in the ledger of money."""
        return f"batch-{self.token}"


class BatchLedger:
    """Records of the batches of one block.

    Args:
        fingerprint: fingerprint of the samples; batches with another one are of no use.
    """

    def __init__(self, dataset: Dataset, block: int, fingerprint: str) -> None:
        self._storage, self._fingerprint = dataset.storage, fingerprint
        self._folder = f"{dataset.path}/{FOLDER}/{block:05d}"
        self.name = f"{dataset.path} block {block}"
        self._claim: Claim | None = None

    def claim(self) -> None:
        """Claim the block, so that no earlier process submits any more."""
        self._claim = take_claim(self._storage, self._folder, uuid.uuid4().hex)

    def check_claim(self) -> None:
        """Raise :class:`SupersededError` if another process has claimed or committed the block."""
        claim = self._claim
        assert claim is not None, "a block is claimed before its batches are submitted"
        # The claims of a committed block are deleted, after which their numbers start again.
        is_own = read_claim(self._storage, claim.folder, claim.number).get("launch") == claim.launch
        if not is_own or is_superseded(self._storage, claim):
            raise SupersededError(
                f"{self._storage.url}: {self.name}: another process submits the batches of this block"
            )

    def open_records(self) -> list[BatchRecord]:
        """Return the batches that are not settled, oldest first."""
        return list(filter(self._is_open, _records(self._storage, self._folder)))

    def _is_open(self, record: BatchRecord) -> bool:
        return not record.is_settled and record.fingerprint == self._fingerprint

    def add(self, keys: Collection[SampleNumber], worst_cost: float) -> BatchRecord | None:
        """Write the record of a batch that will be submitted next.

        Returns:
            None if a process that lost its claim meanwhile has written one, to be taken over.

        Raises:
            SupersededError: another process works on the block.
        """
        records = list(_records(self._storage, self._folder))
        number = max((record.number for record in records), default=-1) + 1
        record = BatchRecord(number, uuid.uuid4().hex, self._fingerprint, tuple(keys), worst_cost)
        if not any(map(self._is_open, records)) and self._storage.create(self.path(record), _encode(record)):
            return record
        self.check_claim()
        return None

    def update(self, record: BatchRecord, **changes: Any) -> BatchRecord:
        """Write changes of a record and return it."""
        record = replace(record, **changes)
        self._storage.replace(self.path(record), _encode(record))
        return record

    def path(self, record: BatchRecord) -> str:
        """Return the path of a record in the run directory."""
        return f"{self._folder}/batch-{record.number:04d}.json"


def open_batches(dataset: Dataset, blocks: Collection[int]) -> list[BatchRecord]:
    """Return the batches in flight of uncommitted blocks, by whatever config."""
    return [
        record
        for folder in uncommitted_folders(dataset, blocks)
        for record in _records(dataset.storage, folder)
        if not record.is_settled
    ]


def _records(storage: Any, folder: str) -> Iterator[BatchRecord]:
    for name in sorted(filter(_NAME.fullmatch, storage.sizes(folder))):
        document = storage.read_json(f"{folder}/{name}")
        if document is None:
            continue  # its block was committed meanwhile
        try:
            keys = tuple((int(row), int(index)) for row, index in document.pop("keys"))
            yield BatchRecord(keys=keys, **document)
        except (TypeError, ValueError, KeyError, AttributeError):
            raise RunFailed(
                f"{storage.url}/{folder}/{name}: not the record of a batch; restore it, or delete it if its batch may "
                "be submitted and paid for again"
            ) from None


def _encode(record: BatchRecord) -> bytes:
    return json.dumps(asdict(record)).encode()
