"""Parameters of security, in one place: what is chosen, how much it is estimated to give, and where the estimate comes from.

Against parties that follow the protocol: 128 bits computational, 40 bits statistical.
"""

from __future__ import annotations

from typing import NamedTuple

KAPPA = 128
"""Bits of computational security: AES-128, the group of Ed25519 (about 126 by Pollard's rho), rows of an extension."""

SIGMA = 40
"""Bits of statistical security."""

# ---- oblivious transfer: `protocols/ot`

IKNP_ROWS = KAPPA
"""Base transfers of an extension (IKNP, CRYPTO 2003; semi-honest, so no check): as many as a correlation has bits."""

HASH_SPAN = 8192
"""Transfers that are hashed under one AES key.

H(x, i, j) = AES_K(z) + z for z = s(x) + i + j 2^64, + being XOR, s the linear orthomorphism (lo, hi) -> (hi, hi ^ lo), i a
transfer's number and j that of an output's block: circular correlation robust in the ideal-cipher model (Guo, Katz, Wang, Yu:
ePrint 2019/074, section 7). Its advantage grows with the queries made under one key (ePrint 2019/1168), so that the key, SHA-256
of session, direction and i / HASH_SPAN, changes.
"""


class Lpn(NamedTuple):
    """A set of the silent extension: so many trees of 2^height leaves, each with one noisy output, and a secret of `dimension` bits."""

    trees: int
    height: int
    dimension: int

    @property
    def outputs(self) -> int:
        """Of an extension."""
        return self.trees << self.height

    @property
    def seed(self) -> int:
        """Transfers that an extension uses up."""
        return self.dimension + self.trees * self.height

    @property
    def net(self) -> int:
        """Transfers that it leaves for others."""
        return self.outputs - self.seed


LPN_WEIGHT = 10
"""Bits of the secret in each output, by the fixed sparse code of Ferret."""

LPN_EMP = Lpn(850, 10, 1 << 16)
"""EMP-toolkit's ferret_b10 (N = 870400), chosen there for 128 bits against attacks on regular noise and dense codes; here for tests alone.

Published estimators: 141 bits by pooled Gauss (ePrint 2022/712), 145 by the algebraic attack (ePrint 2023/176), and at
most 131 by the hybrid one (ePrint 2025/1284), which needs but 768 of the trees for that. But rows are sparse: columns can be left out with
the few outputs that read them (domain reduction, arXiv 2407.19215), the least read one first, until as many outputs as columns
are left: 41950 of 65536. These are without an error one time in 2^61, and solving such sparse equations takes about 2^35: below 100 bits.
"""

LPN_WIDE = Lpn(850, 10, 7 << 14)
"""A secret three quarters longer, for which that leaves 79096 columns: without an error one time in 2^117, 2^37 for each try.

What reuses work from try to try, or allows for a few errors, may save 20 bits of these 154. Of a secret of 5 << 14, with which pooled Gauss
takes 167 bits, information-set decoding (BJMM, ePrint 2022/712) and the hybrid attack 154 each, 53972 columns are left and 2^79: too few.
It costs 8 % more bytes than EMP's.
"""

LPN = LPN_WIDE
"""The set in use: attacks on regular noise are young and still become better, so that a margin is worth this price.

The noise has exactly one error in each tree. The code's rows are random, public, fixed and the same for all sessions, as in Ferret; that a
matrix of this weight is as good as a dense one against all else than leaving out columns is its assumption.
"""

SMALL = 1 << 13
"""Transfers up to which a need is met by IKNP at 16 bytes each, where a whole silent extension would send as much."""

SMALL_IN_ALL = 1 << 15
"""And so many in all of a session; after that every need is met by silent extensions, whose left-over transfers stay."""

AHEAD = 1 << 22
"""Transfers that are made before anybody asks, at most, with other messages, so that few have to wait for an extension."""

PART = 1 << 24
"""Transfers that one batch of them uses at a time; the sender holds 16 bytes of each. What asks for more goes in parts."""

# ---- encrypted linear algebra: `protocols/lattice`

HE_STANDARD = {1024: 26, 2048: 53, 4096: 106, 8192: 214, 16384: 430, 32768: 868}
"""Degree to bits of the modulus at most for 128 bits, classical: secrets uniform in {-1, 0, 1}, errors of standard deviation 3.19 or more.

Source: Bossuat et al., Security Guidelines for Implementing Homomorphic Encryption (ePrint 2024/463), table 5.2; the standard of 2019
(ePrint 2019/939) has up to 3 % more. Errors here are centred binomial of 21 coins, standard deviation 3.24. Several secrets may stand under
one uniform `a` (Peikert, Vaikuntanathan, Waters: CRYPTO 2008, by a hybrid).
"""

SMOOTH = 80
"""Answers are within 2^(1-SMOOTH) of what their message alone determines, each (`protocols/lattice/hiding.py`): 2^40 of them within
2^-39."""

COSET = 4
"""Deviation of a multiplier on its coset of t Z, in units of t; at least 1.8, and the larger, the smaller may be what is added to
outputs."""

HINT = 5.0
RLWE_DEVIATION = 3.2
"""Deviation of what encrypts zeros, and of the secrets and errors as hard as whose RLWE it is, given what the noise says of it
(Hint-RLWE)."""

TAKEN = 1 << 20
"""Rows that one party takes of one encrypted table, under one key, until all of its answers together are 2^-SIGMA away from answers whose
noise says nothing of which rows they are; the distance grows with the square root of their number."""

UNLIKELY = 64
"""Bounds on singular values and norms of drawn errors fail one time in 2^UNLIKELY, for each matrix that is encrypted."""

TAIL = 9.5
"""Standard deviations of noise that every budget allows for: noise is subgaussian, and beyond lies 2 e^-45 < 2^-64 of all coefficients."""
