"""Every party on a second device: the same bytes on every wire as on the CPU, no tensor astray, and products by limbs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privinf.dealer import making
from privinf.dealer.dealer import DealerService
from privinf.graph.private import Runtime, encode_weights, weights_of
from privinf.lowering import lower
from privinf.lowering.lowered import Lowered
from privinf.lowering.program import module_output, next_token
from privinf.server.server import Server
from privinf.session import options
from privinf.session.devices import falls_back
from privinf.session.service import Service
from privinf.transport.connection import Connection
from protocols import activation, matrix
from protocols.correlations import Role
from protocols.linear import Weight, weight_mask
from protocols.party import Party
from protocols.recording import Recorder
from protocols.ring import like, reduce
from tests.support import trio as t
from tests.support import two_party
from tests.support.ladder import LADDER, make
from tests.support.second_device import NAME, Held, Stray, second_device
from tests.support.two_party import Outcome, Session, offline_walk

IDS = (5, 7, 100, 11, 3)
QUICK = ("SM+LN+G", "SM+R", "SM(t)+ScFuFFN")  # every protocol is in one of them
Pass = Callable[[Runtime, bool], Tensor | None]  # a walk, and whether the client's input is known in it


class Both:
    """Runs the same passes, with the same seeds, on the CPU and on the second device."""

    def __init__(self, lowered: Lowered, patch: pytest.MonkeyPatch) -> None:
        self.lowered, self.patch, self.moves = lowered, patch, Counter[str]()

    def tokens(self, *ids: int, logits: bool) -> Pass:
        def one(runtime: Runtime, known: bool) -> Tensor | None:
            there = torch.tensor([ids])
            return next_token(self.lowered.graph, runtime, there if known else there.to("meta"), logits=logits)

        return one

    def module(self, *inputs: Tensor) -> Pass:
        zeros = [torch.zeros_like(x) for x in inputs]

        def one(runtime: Runtime, known: bool) -> Tensor | None:
            online = not offline_walk(runtime.party)
            hidden = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs]
            if not known and online:  # S's share of C's input is 0, but ids are C's alone
                hidden = [zero if zero.is_floating_point() else shape for zero, shape in zip(zeros, hidden, strict=True)]
            given = list(inputs) if known else hidden
            return module_output(self.lowered.graph, runtime, given)

        return one

    def within(self) -> second_device:
        return second_device(self.moves)

    def run(self, device: str, passes: tuple[Pass, ...]) -> list[Outcome]:
        """All on one session, with the cache of the passes before."""
        numbers, graph = iter(range(1, 100)), self.lowered.graph
        self.patch.setattr(two_party, "new_seed", lambda: next(numbers).to_bytes(16, "big"))
        torch.manual_seed(1)
        encoded = encode_weights(graph)
        weights = {name: (record, encoded[name]) for name, (record, _, _) in weights_of(graph).items()}
        session = Session(weights, device, self.within if device == NAME else nullcontext)
        runtimes: dict[Role, Runtime] = {}

        def walk(party: Party, one: Pass) -> Tensor | None:
            runtime = runtimes.setdefault(party.role, Runtime.of(graph, party, device))
            if offline_walk(party):
                return one(runtime.sketch(party), False)
            runtime.party = party
            return one(runtime, not party.is_server)

        return [session.run(lambda party, one=one: walk(party, one)) for one in passes]  # type: ignore[misc]

    def compare(self, *passes: Pass) -> None:
        for here, there in zip(self.run("cpu", passes), self.run(NAME, passes), strict=True):
            assert here.dealt == there.dealt and here.kinds == there.kinds
            for role in Role:
                assert [part for part, _ in here.received[role]] == [part for part, _ in there.received[role]]
                for (part, a), (_, b) in zip(here.received[role], there.received[role], strict=True):
                    assert type(b) is Held and torch.equal(reduce(a, part.bits), reduce(b.cpu(), part.bits))
            assert type(there.client) is Tensor and torch.equal(here.client, there.client)


@pytest.mark.parametrize("variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in LADDER])
def test_the_ladder_puts_the_same_bytes_on_every_wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Two passes with a cache: the prompt's, with logits, and one token's, with the argmax."""
    lowered, _ = make(tmp_path, variant, n_layer=1, vocab_size=101)
    both = Both(lowered, monkeypatch)
    both.compare(both.tokens(*IDS, logits=True), both.tokens(42, logits=False))
    assert {"uniform", "unpack", "pack", "_back"} <= set(both.moves)


class Words(nn.Module):
    """Embedding, softmax, products of two private values, and what only moves or adds."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.map = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        y = self.map(self.words(ids)) * x + 0.25
        scores = torch.softmax(y @ x.transpose(-1, -2) * 0.5, -1)
        return torch.cat([scores @ y, nn.functional.gelu(x[:, 1:3])], 1).reshape(2, -1)


def test_a_module_puts_the_same_bytes_on_every_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.tensor([[1, 2, 3], [7, 8, 9]]), torch.randn(2, 3, 6)
    both = Both(lower(Words().eval(), inputs), monkeypatch)
    both.compare(both.module(*inputs))


def test_three_parties_on_the_second_device_move_their_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real parties over TLS, two queries, one of them prepared: weights move and masks are made once, masked ones once a session.

    No pass is written down, and server and dealer say so.
    """
    model, moves, masks = t.lowered(), Counter[str](), Counter[str]()
    caplog.set_level(logging.INFO, "privinf")

    def unasked(self: Recorder, *args: Any) -> None:
        raise AssertionError("a pass on a device is written down")

    monkeypatch.setattr(Recorder, "__init__", unasked)

    def there(service: type[Service]) -> None:
        handle = service.handle

        def within(self: Service, connection: Connection) -> None:
            with second_device(moves):
                handle(self, connection)

        monkeypatch.setattr(service, "handle", within)

    def counted(seed: bytes, weight: Weight, device: str) -> Tensor:
        masks[weight.name] += 1
        return weight_mask(seed, weight, device)

    monkeypatch.setattr(options, "check_device", lambda name: None)
    there(DealerService)
    there(Server)
    monkeypatch.setattr(making, "weight_mask", counted)
    prompt, names = [3, 14, 15, 92, 65], set(weights_of(model.graph))
    with second_device(moves, strict=False), t.trio(model, cache=tmp_path, device=NAME) as parties:
        for prepared in (False, True):
            client = parties.client(device=NAME)
            if prepared:
                client.prepare(len(prompt), max_new_tokens=2)
            tokens = [token.id for token in client.generate(ids=prompt, max_new_tokens=2, ignore_eos=True)]
            assert t.is_greedy(prompt, tokens)
    said = [record.name for record in caplog.records if record.getMessage() == falls_back(NAME)]
    assert sorted(said) == ["privinf.dealer", "privinf.server"]
    assert moves["encode_weights"] == len(names) and masks == dict.fromkeys(names, 1)
    assert moves["set_up"] == 3 * len(names)  # a session prepares


# ---- and that all this would notice


def fails(says: str, *actions: Callable[[], Any]) -> None:
    for action in actions:
        with pytest.raises(Stray, match=says):
            action()


def test_the_second_device_refuses_what_cuda_refuses() -> None:
    with second_device():
        x = torch.zeros((2, 2), dtype=torch.int64, device=NAME)
        fails("integer matrices", lambda: x @ x, lambda: torch.mv(x, x[0]), lambda: torch.bmm(x[None], x[None]))
        with pytest.raises(RuntimeError):
            x.numpy()
        assert (x.double() @ x.double()).device == x.device and matrix.matmul(x, x).device == x.device


def test_strays_are_noticed() -> None:
    constant = torch.tensor([1, 0])
    with second_device():
        x = torch.zeros((2, 2), dtype=torch.int64, device=NAME)
        fails("meets", lambda: x + constant, lambda: x[:, constant], lambda: torch.cat([x[0], constant]))
        fails("computed on the CPU", lambda: torch.arange(3), lambda: torch.zeros(2), lambda: constant + 1)
        fails("moves between", lambda: constant.to(NAME), lambda: x.cpu())
        assert (x + like(constant, x)).device == x.device and (x + torch.tensor(3)).device == x.device


def test_a_stray_in_a_protocol_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(lower(nn.GELU().eval(), torch.randn(2, 3)), monkeypatch)
    monkeypatch.setattr(activation, "like", lambda constant, x: constant)
    with pytest.raises(Stray, match="meets the second device"):
        both.run(NAME, (both.module(torch.randn(2, 3)),))
