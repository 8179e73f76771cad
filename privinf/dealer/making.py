"""What deals for a session is made here: with the masks of the model's weights, and the tapes that go with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from protocols.correlations import Kind
from protocols.linear import Weight, weight_mask
from protocols.sources.dealer import Dealer
from protocols.sources.taping import DealtTapes


class Dealing(Protocol):
    """Deals for one session, passes of names that grow: see `protocols.sources.dealer.Dealer`."""

    next_name: int

    def deal_pass(self, kinds: Sequence[Kind], digest: bytes = b"") -> Iterator[bytes]:
        """The client's payloads of a pass, dealt as they are read; checked now."""

    def deal_further(self) -> tuple[int, Iterator[bytes]]:
        """The same of what is one position further than the last pass, and how many correlations these are."""

    def rewind(self, name: int) -> None:
        """Takes back what was dealt from this name on."""

    def end(self) -> None:
        """The session is over."""


class Maker:
    """Makes dealers, and keeps the masks and tapes of the model that was asked for last."""

    def __init__(self, device: str, memory: int) -> None:
        self._device, self._memory = device, memory
        self._kept: tuple[tuple[bytes, tuple[Weight, ...]], dict[str, Tensor], DealtTapes] | None = None
        self._expanding = threading.Lock()  # a large model takes seconds

    def dealer(self, server: bytes, client: bytes, mask_seed: bytes, weights: tuple[Weight, ...]) -> Dealer:
        """One for these seeds of the parties, and this of the weights' masks."""
        with self._expanding:
            if self._kept is None or self._kept[0] != (mask_seed, weights):
                self._kept = None
                masks = {w.name: weight_mask(mask_seed, w, self._device) for w in weights}
                self._kept = (mask_seed, weights), masks, DealtTapes()
            _, masks, tapes = self._kept
            return Dealer(server, client, masks, self._device, self._memory, tapes)
