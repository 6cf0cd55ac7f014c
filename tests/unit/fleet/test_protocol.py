"""Exceptions of the protocol keep their fields on the way from an actor to the driver."""

from __future__ import annotations

import pickle

from plad_dist.fleet.protocol import EngineDiedError, StopStageError


def test_the_rows_in_flight_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(EngineDiedError("out of memory", {("samples/teacher", 3): (1, 2)})))
    assert (error.reason, error.rows_in_flight) == ("out of memory", {("samples/teacher", 3): (1, 2)})


def test_the_cost_of_a_stop_survives_pickling_and_is_not_in_its_message() -> None:
    error = pickle.loads(pickle.dumps(StopStageError("the spending cap is reached", 0.25)))
    assert (str(error), error.cost) == ("the spending cap is reached", 0.25)
