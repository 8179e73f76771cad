"""How the client chooses the next token from rounded logits, and where it stops; all of it on the client's side.

Greedy choice needs no logits: the token comes from a secure argmax, and the client learns nothing else. Every other choice is made
by the client from logits that the server must grant.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from protocols.errors import ConfigError

if TYPE_CHECKING:  # torch is loaded where it computes: the process that starts the parties of `privinf run` has no use for it
    from torch import Tensor

    from privinf.client.grammar import Mask
    from privinf.lowering.lowered import Lowered

MAX_TEMPERATURE = 100.0
MAX_PENALTY, MAX_BIAS = 2.0, 100.0  # as in OpenAI's interface
MAX_STOPS, MAX_STOP_CHARS = 16, 1000
_PURPOSE = "privinf sampling"


@dataclass(frozen=True)
class Sampling:
    """The choice of tokens, and what ends a reply besides the model's end token; ConfigError for a value out of range.

    `temperature` 0 is greedy. Else logits are divided by it, `top_k` keeps the k largest (0: all), and of what is left `top_p`
    keeps the most probable tokens up to and with the one that brings their sum to p. `seed` names the random numbers, see
    `Sampler`; None draws a fresh one. `stop` are texts at which the reply ends, and which it does not hold; `stop_ids` are tokens
    that end it as the end token does.

    Before all of this each token's logit gets its `bias` (pairs of an id and a number), and loses `presence_penalty` if the reply has
    the token already and `frequency_penalty` for each time that it has. With a `grammar` (`privinf.client.grammar`) only what goes on
    with it is chosen. Each of these takes logits, also where the choice is greedy.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    grammar: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        self._put("temperature", _real(self.temperature, "the temperature", 0.0, MAX_TEMPERATURE))
        self._put("top_p", _real(self.top_p, "top-p", 0.0, 1.0))
        self._put("top_k", _whole(self.top_k, "top-k", 0, 1 << 31))
        if self.top_p == 0:
            raise ConfigError("top-p is 0, which leaves no token", remedy="give a number above 0, and at most 1")
        if self.seed is not None:
            self._put("seed", _whole(self.seed, "the seed", 0, (1 << 64) - 1))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stop) > MAX_STOPS or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS for text in stop):
            raise ConfigError(f"stop texts are at most {MAX_STOPS}, each of 1 to {MAX_STOP_CHARS} characters")
        self._put("stop", stop)
        for name in ("frequency_penalty", "presence_penalty"):
            self._put(name, _real(getattr(self, name), f"the {name.replace('_', ' ')}", -MAX_PENALTY, MAX_PENALTY))
        what = "a token's bias"
        self._put(
            "bias", tuple([(_whole(each[0], "a token", 0, 1 << 31), _real(each[1], what, -MAX_BIAS, MAX_BIAS)) for each in self.bias])
        )
        self._put("stop_ids", tuple(_whole(number, "a stop token", 0, 1 << 31) for number in self.stop_ids))

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def changed(self) -> bool:
        """Whether tokens are chosen from other logits than the model's."""
        return bool(self.frequency_penalty or self.presence_penalty or self.bias or self.grammar)

    @property
    def takes_logits(self) -> bool:
        """Whether the client chooses, from logits: all but the plain greedy choice."""
        return not self.greedy or self.changed


def _real(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is not a number from {low:g} to {high:g}")
    return float(value)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ConfigError(f"{name} is not a whole number from {low} to {high}")
    return number


GREEDY = Sampling()


def kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be chosen, (n,) int64, most probable first and the lower id first among equals; their probabilities, float64."""
    import torch

    values, ids = torch.sort(logits.reshape(-1).double(), descending=True, stable=True)
    if sampling.greedy:
        return ids[:1], torch.ones(1, dtype=torch.float64)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    p = torch.softmax((values - values[0]) / sampling.temperature, 0)
    if sampling.top_p < 1:
        before = torch.cumsum(p, 0) - p  # what the more probable ones have
        count = max(1, int((before < sampling.top_p).sum()))
        p, ids = p[:count] / p[:count].sum(), ids[:count]
    return ids, p


class Sampler:
    """Chooses tokens, one after the other, for one reply.

    The n-th choice of a seed takes bytes 8n to 8n+7 of one AES-128-CTR keystream as a little-endian integer, and of that the upper 53
    bits, as a number u in [0, 1): the chosen token is the first at which the running sum of probabilities passes u. The key is
    HKDF-Expand-SHA256 of the seed's 16 bytes, little-endian, for the purpose "privinf sampling". So equal seeds and equal logits give
    equal tokens. Logits repeat only up to their rounding: two runs may differ by a few units of 2^-10, and then, rarely, in a token.
    """

    def __init__(self, sampling: Sampling) -> None:
        from protocols.prg import Prg, derive, new_seed

        self._sampling = sampling
        seed = new_seed() if sampling.seed is None else sampling.seed.to_bytes(16, "little")
        self._stream = Prg(derive(seed, _PURPOSE)).stream(0)
        self._seen = Counter[int]()
        self._mask: Mask | None = None
        self.ended = False
        """Whether the reply is whole by its grammar: none can follow."""

    def __repr__(self) -> str:
        return "Sampler(state hidden)"

    def choose(self, logits: Tensor) -> int:
        """A token's id from logits, (V,) or (1, V)."""
        import torch

        ids, p = kept(self._changed(logits), self._sampling)
        u = (int.from_bytes(self._stream.raw(8).tobytes(), "little") >> 11) / 2**53
        passed = torch.cumsum(p, 0) > u
        place = int(passed.nonzero()[0]) if bool(passed.any()) else len(ids) - 1  # rounding may leave the sum just below 1
        token = int(ids[place])
        self._seen[token] += 1
        self.ended = self._mask is not None and self._mask.take(token)
        return token

    def begin(self, lowered: Lowered) -> None:
        """Where there is a grammar, it is that of this model's tokens; once."""
        if self._sampling.grammar and self._mask is None:
            from privinf.client.grammar import Mask

            self._mask = Mask(lowered, self._sampling.grammar)

    def _changed(self, logits: Tensor) -> Tensor:
        """The logits by which a token is chosen, (V,) float64, or those that came where nothing changes them."""
        sampling = self._sampling
        if not sampling.changed:
            return logits
        found = logits.reshape(-1).double().clone()
        for token, bias in sampling.bias:
            if token < len(found):
                found[token] += bias
        for token, times in self._seen.items():
            found[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
        if self._mask is not None:
            found[~self._mask.allowed()] = -math.inf
        return found


class Stops:
    """Watches a reply for stop texts, and holds back what may become one."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._texts, self._held = texts, ""
        self.found = False

    def add(self, text: str, *, last: bool = False) -> str:
        """What of the new text, and of what was held back, is part of the reply; with `last` nothing is held back."""
        if self.found or not self._texts:
            return "" if self.found else text
        self._held += text
        places = [place for stop in self._texts if (place := self._held.find(stop)) >= 0]
        if places:
            self.found, shown, self._held = True, self._held[: min(places)], ""
            return shown
        held = 0 if last else max(_overlap(self._held, stop) for stop in self._texts)
        shown, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
