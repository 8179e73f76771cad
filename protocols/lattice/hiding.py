"""How wide the randomness of an answer must be so that it shows its message alone: the proof, and its numbers.

An answer to one vector r of Z_t^n has, for the one who decrypts, c1 = sum_j x_j a_j + u a + f and, for each output,
c0 + c1 s = Q/t m + E x + (u e' + f s) + y modulo Q: m = W r, E the errors of his ciphertexts and of their messages' rounding (rational,
part of E), e' those of his public keys b = -a s + e'. Instead of r it takes x from the discrete Gaussian on r + t Z^n of deviation COSET t:
Q/t W x is Q/t m modulo Q all the same. u and f come from D_Z of deviation HINT, y from D of deviation `deviation` on 2^-F Z (`gauss`). All
of it is fresh in every answer. y is, within eps, y1 + y2 of deviations whose squares add up to its own.

1. *c1* (Hint-RLWE; Kim, Lee, Seo, Song, CRYPTO 2023, theorem 1): given the hints u e'_k + f s_k + y2 of all blocks k, a u + f is
   pseudorandom where RLWE of deviation RLWE_DEVIATION is, if 1/RLWE_DEVIATION^2 >= 2 (1/HINT^2 + B/dev(y2)^2), B the largest over all
   places zeta of sum_k |e'_k(zeta)|^2 + |s_k(zeta)|^2, and RLWE_DEVIATION is at least sqrt(2) times the smoothing deviation of Z^2N. So c1
   is replaced by a uniform element that knows nothing of x, and the hints by what the holder could draw himself.
2. *What is left* is v = E x + y1. Completing the square (Peikert, CRYPTO 2010), with S = (COSET t)^2, Y = dev(y1)^2: P(v) is proportional
   to f(v) rho_C(r + t Z^n - x0(v)), C = (1/S + E^T E/Y)^-1, f and x0 without r. That sum over the coset is the same for all r up to
   (1-eps)/(1+eps) where the least eigenvalue of C is at least (t smoothing(n))^2 (Micciancio, Regev: FOCS 2004, lemma 4.4), so where
   1/COSET^2 + t^2 sigma_max(E)^2/Y <= 1/smoothing(n)^2: all outputs of r at once are within 2 eps of a distribution that hangs on m alone
   (circuit privacy: Bourse, Del Pino, Minelli, Wee, CRYPTO 2016). On m it hangs through Q m/t modulo 1 alone, a shift of the grid: y's grid
   is so fine (2^-64 of its deviation, mostly 2^-80) that the probability of what is left of a coefficient moves by 2^-65 at most, and 2^49
   coefficients together by 2^-40 (Pinsker's inequality, since the distances' squares add up).
3. m itself is split by the public stream that stands for the upper part of c0 (`linear`, `matmul`).
For polynomials r in Y modulo t (`matmul`) E is block-negacyclic with blocks of `roots`. eps = 2^-SMOOTH, so that 2^40 answers stay within
2^-39. A row that is taken, not multiplied, has its own error alone, over which y2's place is taken by a plain Gaussian flood: `row`.

*Singular values.* An entry of E is a centred binomial of 42 half coins and a centred rounding coin. Symmetrising the latter, every even
moment is at most that of a Gaussian of variance 11, every odd one 0, so that E tr (E^T E)^p, a sum of such moments with coefficients of
which absolute values are taken, is at most that of the Gaussian (for negacyclic E: cyclic) matrix, whose norm has mean at most sqrt(11
roots) (sqrt(rows) + sqrt(columns)) (Chevet, Gordon) and is as concentrated as a Gaussian; Markov's inequality with the best p gives
`largest`. Norms of vectors: Hsu, Kakade, Zhang (2012). Each bound fails one time in 2^UNLIKELY, over the holder's keys and errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocols import security

VARIANCE = 10.5
"""Of an error's coefficient (`noise.errors`); with the random rounding of a message, at most 1/4 more."""
SYMMETRIC = VARIANCE + 0.5
"""Of an entry of E whose rounding is made symmetric."""
SECRET = 2 / 3
"""Of a secret's coefficient."""


@dataclass(frozen=True, slots=True)
class Hiding:
    """Deviations, in units of the ciphertext: of y, and of all that an answer's noise is, y included."""

    deviation: float
    noise: float


def smoothing(dimension: int) -> float:
    """The deviation from which on a Gaussian on a shifted Z^n weighs the same within 1 +- 2^-SMOOTH (Micciancio, Regev: lemma 3.3)."""
    return math.sqrt((math.log(2 * dimension) + security.SMOOTH * math.log(2)) / 2) / math.pi


def largest(outputs: int, inner: int, roots: int = 1) -> float:
    """The largest singular value of errors (outputs, inner), each a polynomial in Y of so many coefficients; see the module's text."""
    mean, places = math.sqrt(outputs) + math.sqrt(inner), roots * min(outputs, inner) * 2.0**security.UNLIKELY
    moments = (math.ceil(2.0 ** (k / 4)) for k in range(60))
    return math.sqrt(SYMMETRIC * roots) * min((mean + math.sqrt(2 * p)) * math.pow(places, 1 / (2 * p)) for p in moments)


def norm(count: int, others: int = 1) -> float:
    """The largest norm of `others` vectors of so many errors."""
    x = security.UNLIKELY * math.log(2) + math.log(others)
    return math.sqrt((VARIANCE + 0.25) * (count + 2 * math.sqrt(count * x) + 2 * x))


def hints(degree: int, secrets: int) -> float:
    """Deviation of y2 by the condition of Hint-RLWE."""
    x = security.UNLIKELY * math.log(2) + math.log(degree)
    bound = (VARIANCE + SECRET) * degree * (secrets + math.sqrt(2 * secrets * x) + x)
    rest = 1 / security.RLWE_DEVIATION**2 - 2 / security.HINT**2
    assert rest > 0 and math.sqrt(2) * smoothing(2 * degree) <= security.RLWE_DEVIATION
    return math.sqrt(2 * bound / rest)


def masking(degree: int) -> float:
    """Deviation of u e' + f s."""
    return security.HINT * math.sqrt(norm(degree, 1 << 10) ** 2 + degree)


def over(plain: int, dimension: int, singular: float) -> float:
    """Deviation of y1 for errors of this largest singular value, by the condition of step 2."""
    return plain * singular / math.sqrt(smoothing(dimension) ** -2 - security.COSET**-2)


def multiples(plain: int, outputs: int, inner: int, degree: int, secrets: int, roots: int = 1) -> Hiding:
    """For answers modulo `plain` to vectors of `inner` elements, or polynomials of `roots` coefficients, that meet so many outputs each."""
    found = math.hypot(over(plain, inner * roots, largest(outputs, inner, roots)), hints(degree, secrets))
    x = security.COSET * plain * norm(inner * roots, outputs * roots)
    return Hiding(found, math.hypot(found, x, masking(degree)))


def row(columns: int, degree: int, secrets: int) -> Hiding:
    """For rows of a table of so many columns, one for each answer: its errors move a flood by 0.4 sqrt(taken) norm / deviation in all."""
    flood = 0.4 * math.sqrt(security.TAKEN) * norm(columns, 1 << 20) * 2.0**security.SIGMA
    found = math.hypot(flood, hints(degree, secrets))
    return Hiding(found, math.hypot(found, math.sqrt(VARIANCE + 0.25), masking(degree)))
