"""S and C alone in this process: both ends of the source `two_party`, over twins of its transfers and lattice, or the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.threads import at_both
from privinf.transport.memory import memory_pair
from protocols.correlations import Kind, Role
from protocols.lattice.weights import EncryptedWeight, Form, InMemory, LatticeKeys, WeightKeys, encrypt_weight
from protocols.party import Online, Party, Tables, Trace
from protocols.rounds import Protocol_, parallel
from protocols.sources.base import PartySource
from protocols.sources.two_party.schedule import WINDOW
from protocols.sources.two_party.source import Preprocessing, TwoPartySource
from protocols.sources.two_party.tables import SealedTables
from tests.support.plain_lattice import PlainLattice
from tests.support.plain_transfers import PlainTransfers
from tests.support.two_party import Weights
from tests.support.waiting import PATIENCE


def both(program: Callable[[Role, Any], Any]) -> tuple[dict[Role, Any], dict[str, Any]]:
    """`program(role, channel)` in a thread for each party; their results, and what the client's meter counted."""
    channels = dict(zip(Role, memory_pair(timeout=PATIENCE), strict=True))
    for channel in channels.values():
        channel.meter.phase = "offline"
    results = at_both(lambda role: program(role, channels[role]), channels)
    return results, channels[Role.CLIENT].meter.snapshot()["offline"]


def walked(sources: Mapping[Role, PartySource], protocol: Callable[[Role], Protocol_[Any]]) -> tuple[dict[Role, Any], dict[str, Any]]:
    """A protocol of each party, run over a link."""
    return both(lambda role, channel: Party(role, Online(role, channel, sources[role])).run(protocol(role)))


class Sealed(dict[Form, EncryptedWeight]):
    """A weight at C, encrypted in a form when it is first asked for."""

    def __init__(self, keys: LatticeKeys, name: str, encoded: Tensor) -> None:
        super().__init__({Form(name, 0, 0, 1): EncryptedWeight(Form(name, 0, 0, 1), b"", [], InMemory())})
        self._keys, self._encoded = keys, encoded

    def get(self, form: Form, default: Any = None) -> EncryptedWeight:
        if form not in self:
            self[form] = EncryptedWeight.read(form, encrypt_weight(self._keys, form, self._encoded))
        return self[form]


def sealed(weights: Weights) -> dict[Role, dict[str, Any]]:
    """What both have of the weights with ciphertexts; S has the diagonal ones themselves as well."""
    keys = LatticeKeys()
    dense = {name: tensor for name, (weight, tensor) in weights.items() if len(weight.shape) == 2 and "temperature" not in name}
    server = {name: WeightKeys(keys, name) if name in dense else tensor for name, (_, tensor) in weights.items()}
    return {Role.SERVER: server, Role.CLIENT: {name: Sealed(keys, name, tensor) for name, tensor in dense.items()}}


class Alone:
    """Both ends, for `tests.support.two_party.Session`: C holds nothing of the weights.

    `transfers`: (role, traced) -> an end; `lattice`: (role, its transfers, traced) -> an end; `held`: what each has of the weights.
    """

    def __init__(
        self,
        weights: Weights,
        device: str = "cpu",
        transfers: Callable[[Role, bool], Any] = PlainTransfers,
        lattice: Callable[[Role, Any, bool], Any] = PlainLattice,
        window: int = WINDOW,
        held: Callable[[Weights], dict[Role, dict[str, Any]]] | None = None,
    ) -> None:
        self.client_weights: dict[str, Tensor] = {}
        has = held(weights) if held else {role: {name: tensor for name, (_, tensor) in weights.items()} for role in Role}
        ends = {role: transfers(role, False) for role in Role}
        lattices = {role: lattice(role, ends[role], False) for role in Role}
        self.parties = {role: TwoPartySource(role, ends[role], lattices[role], has[role], device=device, window=window) for role in Role}
        self.ends: dict[Role, PartySource] = dict(self.parties)
        self.tables: dict[Role, Tables] = {role: SealedTables(role, lattices[role], has[role]) for role in Role}
        traced = transfers(Role.CLIENT, True)
        hidden = lattice(Role.CLIENT, traced, True)
        self.twin = TwoPartySource(Role.CLIENT, traced, hidden, {}, traced=True, window=window)
        walked(self.ends, lambda role: parallel(ends[role].start(), lattices[role].start()))
        Party(Role.CLIENT, Trace(Role.CLIENT)).run(parallel(traced.start(), hidden.start()))
        self.predicted: list[Preprocessing] = []

    def begin_pass(self, kinds: Sequence[Kind]) -> bytes:
        """Both begin; what it will take is predicted."""
        for end in self.ends.values():
            end.begin_pass(kinds)
        self.predicted.append(self.twin.predict(kinds))
        return b""

    def end_pass(self, kinds: Sequence[Kind]) -> None:
        """Nothing is left to do."""

    def preprocess(self) -> dict[str, Any]:
        """Both make what they were told of; what was counted."""
        return walked(self.ends, lambda role: self.ends[role].preprocess())[1]
