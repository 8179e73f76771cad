"""Sessions whose passes are over several sequences, by parties in this process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from privinf.graph.private import Runtime, encode_weights, weights_of
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import next_tokens
from protocols.correlations import Role
from protocols.party import Party
from tests.support.two_party import Outcome, Session, offline_walk


class Batches:
    """A session whose passes are over several sequences."""

    def __init__(self, lowered: Lowered, *, fills: int = 0, **session: Any) -> None:
        encoded = encode_weights(lowered.graph)
        self._graph, self._fills = lowered.graph, fills
        self._session = Session({name: (record, encoded[name]) for name, (record, _, _) in weights_of(lowered.graph).items()}, **session)
        self._runtimes: dict[Role, Runtime] = {}

    def step(self, new: dict[int, list[int]], **more: Any) -> Outcome:
        """New ids of these sequences."""

        def program(party: Party) -> Tensor | None:
            before = self._runtimes.get(party.role) or Runtime.of(self._graph, party, fills=self._fills)
            online = not offline_walk(party)
            runtime = before if online else before.sketch(party)
            runtime.party = party
            if online:
                self._runtimes[party.role] = runtime
            ids = torch.tensor([[each for part in new.values() for each in part]])
            counts = [(number, len(part)) for number, part in new.items()]
            known = not party.is_server and online
            return next_tokens(self._graph, runtime, ids if known else ids.to("meta"), counts, **more)

        return self._session.run(program)
