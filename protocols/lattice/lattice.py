"""One party's end of encrypted linear algebra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from protocols.correlations import Role
from protocols.errors import CorrelationError
from protocols.lattice import gilboa
from protocols.lattice.ciphertext import Keys
from protocols.lattice.gilboa import Products, product_shape
from protocols.lattice.kept import Entry, Kept, Use, cut, dearer, perform, tasks
from protocols.lattice.linear import linear, lookup
from protocols.lattice.lines import Joined, Line
from protocols.lattice.matmul import Chunk, answer, seal
from protocols.lattice.parameters import Budget
from protocols.lattice.plan import choose
from protocols.lattice.weights import EncryptedWeight, Form, WeightKeys
from protocols.ring import blank, known, reduce
from protocols.rounds import Protocol_, parallel

HeldWeight = WeightKeys | EncryptedWeight | Mapping[Form, EncryptedWeight] | None
"""What a party has of an encrypted weight."""


class Lattice:
    """One party's end, for one session; `traced`: on blanks, for a prediction.

    `transfers` are the same session's oblivious transfers, which carry what is too small for a ciphertext.
    """

    def __init__(self, role: Role, transfers: Products, traced: bool = False) -> None:
        self.role, self.transfers, self.traced = role, transfers, traced
        self._keys: dict[tuple[Role, int, tuple[int, ...]], Keys] = {}
        self._kept = Kept()

    def __repr__(self) -> str:
        return f"Lattice(role={self.role.value}, traced={self.traced}, values hidden)"

    def trace(self) -> Lattice:
        """An end that is traced, for the same keys: what the next calls of this one cost. Its transfers are this one's `trace()`."""
        found = Lattice(self.role, self.transfers.trace(), True)
        found._keys = {name: Keys(keys.budget, keys.count) for name, keys in self._keys.items()}
        found._kept = self._kept.copy()
        return found

    def apart(self) -> Lattice:
        """An end on the same keys that keeps operands of its own: those of another source have the same names."""
        found = Lattice(self.role, self.transfers, self.traced)
        found._keys = self._keys
        return found

    @property
    def resting(self) -> int:
        """Bytes of ciphertexts that stay for later products."""
        return self._kept.nbytes

    def forget(self) -> None:
        """The cached operands of products are gone: what is kept of them goes too."""
        self._kept.clear()

    def start(self) -> Protocol_[None]:
        """Once a session. No message: keys travel with the first product that needs them."""
        return
        yield []

    def matmul(
        self, holder: Role, left: Tensor, right: Tensor, bits: int, need: Tensor | None = None, kept: Joined | None = None
    ) -> Protocol_[Tensor]:
        """Shares of left @ right modulo 2^bits -> (..., n, m); left (..., n, d) at the other party, right (..., d, m) at `holder`.

        Each passes a blank for what it does not know; entries are any representatives. `need` (n, m), bool and public: which outputs are
        wanted; what the others are is not said. By ciphertexts (`protocols.lattice.matmul`), or where sizes are small by oblivious
        transfer (`gilboa`): `plan.choose`. `kept`: right is joined along an axis, -1 or -2, from pieces that have names, by heads
        (`kept.Line`), and what of them is there from an earlier product is not sent again.
        """
        shape = product_shape(left, right)
        heads, (n, d), m = math.prod(shape[:-2]), left.shape[-2:], right.shape[-1]
        needed = n * m if need is None else int(need.sum())
        axis, lines = kept or (0, ())
        there = self._kept.uses(holder, axis, bits, lines) if lines else None
        plan = choose(heads, n, d, m, bits, needed) if heads * needed * d else None
        if plan is not None and there:
            counts = {(degree, primes): keys.count for (who, degree, primes), keys in self._keys.items() if who is holder}
            if dearer(self._kept, counts, holder, axis, bits, lines, (heads, n, d, m), plan):
                there = []
        if plan is None and not there:
            return (yield from gilboa.matmul(self.transfers, holder, left, right, bits))
        # (H, n, d) and (H, d, m)
        lefts = left.expand(*shape[:-2], n, d).reshape(heads, n, d) if known(left) else blank(heads, n, d)
        rights = right.expand(*shape[:-2], d, m).reshape(heads, d, m) if known(right) else blank(heads, d, m)
        if there:
            found = yield from self._again(holder, lefts, rights, bits, need, axis, lines, there)
        else:
            assert plan is not None
            keys, chunk = self._keys_of(holder, plan.budget), Chunk(plan, stays=there is not None)
            if there is not None:
                names = [tuple(line.names[k] for line in lines) for k in range(len(lines[0].names))]
                entry = Entry(chunk, tuple(line.heads for line in lines), names, list(lines[0].sizes))
                self._kept.put(holder, axis, bits, entry)
            yield from seal(self.role, holder, keys, chunk, plan, rights)
            found = yield from answer(self.transfers, self.role, holder, keys, chunk, lefts, need)
        return found.reshape(shape) if known(found) else blank(*shape)

    def _again(
        self, holder: Role, left: Tensor, right: Tensor, bits: int, need: Tensor | None, axis: int, lines: Sequence[Line], there: list[Use]
    ) -> Protocol_[Tensor]:
        """A product of which some of right is there."""
        (heads, n, d), m = left.shape, right.shape[-1]
        todo = tasks(self._kept, there, holder, axis, bits, lines, (heads, n, d, m))
        runs = []
        for task in todo:
            start, size = task.start, task.entry.size
            lefts = cut(left, lines, task.lines, 0 if axis == -1 else -1, start, size)
            rights = cut(right, lines, task.lines, axis, start + size - task.new, task.new)
            wanted = need[:, start : start + size] if need is not None and axis == -1 else need
            keys = self._keys_of(holder, task.entry.chunk.plan.budget)
            runs.append(perform(self.transfers, self.role, holder, keys, task, axis, lefts, rights, wanted))
        answers = yield from parallel(*runs)
        if not known(*answers):
            return blank(heads, n, m)
        out = left.new_zeros((heads, n, m), device="cpu") if known(left) else right.new_zeros((heads, n, m), device="cpu")
        starts = [sum(line.heads for line in lines[:k]) for k in range(len(lines))]
        for task, found in zip(todo, answers, strict=True):
            place = torch.cat([torch.arange(starts[k], starts[k] + lines[k].heads) for k in task.lines])
            if axis == -1:
                out[place, :, task.start : task.start + task.entry.size] = found
            else:
                out[place] += found
        return reduce(out, bits)

    def _keys_of(self, holder: Role, ring: Budget) -> Keys:
        return self._keys.setdefault((holder, ring.degree, ring.primes), Keys(ring))

    def linear(self, weight: HeldWeight, r: Tensor, out: int, bits: int, *, transposed: bool = False) -> Protocol_[Tensor]:
        """Shares of -(r W), (..., out), modulo 2^bits: r (..., in) at C, a blank at S; see `protocols.lattice.linear`.

        `weight` is a `WeightKeys` at S; at C an `EncryptedWeight`, or several by their form; None where only shapes count.
        """
        form = Form("" if weight is None else _name(weight), r.shape[-1], out, bits, transposed)
        rows = r.reshape(-1, r.shape[-1]) if known(r) else blank(math.prod(r.shape[:-1]), r.shape[-1])
        found = yield from linear(_held(weight, form), form, rows)
        return found.reshape(*r.shape[:-1], out) if known(found) else blank(*r.shape[:-1], out)

    def lookup(self, table: HeldWeight, ids: Tensor, out: int, bits: int, size: int) -> Protocol_[Tensor]:
        """Shares of rows of S's table (size, out), modulo 2^bits, (count, out): ids (count,) below size at C, a blank at S."""
        form = Form("" if table is None else _name(table), size, out, bits, False, True)
        return (yield from lookup(_held(table, form), form, ids))


def _name(held: WeightKeys | EncryptedWeight | Mapping[Form, EncryptedWeight]) -> str:
    if isinstance(held, WeightKeys):
        return held.name
    return held.form.name if isinstance(held, EncryptedWeight) else next(iter(held)).name


def _held(held: HeldWeight, form: Form) -> WeightKeys | EncryptedWeight | None:
    """What belongs to this form; CorrelationError where C keeps another."""
    if held is None or isinstance(held, WeightKeys):
        return held
    found = (held if held.form == form else None) if isinstance(held, EncryptedWeight) else held.get(form)
    if found is None:
        text = f"what is kept of the weight {form.name} has another form than is asked for"
        raise CorrelationError(text, remedy="receive the set-up anew")
    return found
