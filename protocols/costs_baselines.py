"""What the protocols of the ladder's baselines cost, as in `costs`."""

from __future__ import annotations

from protocols import activation as act
from protocols import norm
from protocols.costs import Declared, compare, dealt, exchanged, multiply, open_masked, rescale


def relu(count: int, compare_bits: int, bits: int) -> Declared:
    """An opening, a comparison, the bit and its product with the mask, an extension."""
    selected = dealt((count, compare_bits), (count, compare_bits))
    return open_masked((count, compare_bits)) + compare(count, compare_bits) + selected + rescale(count, compare_bits, 0, bits)


def gelu(count: int, compare_bits: int, bits: int) -> Declared:
    """Two comparisons under one mask clamp; the line of a piece of 256 is opened, slope and constant; both parts are extended."""
    ring = act.PRODUCT_BITS
    clamped = compare(2 * count, compare_bits, masks=count) + dealt((2 * count, ring), (2 * count, ring)) + open_masked((count, ring))
    line = dealt((count * 2**act.INDEX_BITS // 64, 64), *[(count, ring)] * 5) + exchanged((2 * count, ring))
    return open_masked((count, ring)) + clamped + line + rescale(count, ring, act.SLOPE_FRAC, bits).beside(rescale(count, ring, 0, bits))


def layer_norm(rows: int, width: int, from_bits: int, frac: int, size_bits: int, bits: int) -> Declared:
    """x - mean is opened once, of the width; everything else is a few elements a row."""
    count, (ring, c_frac), octaves = rows * width, norm.centred(size_bits), norm.octaves(size_bits)
    root_bits = norm.INVERSE_FRAC + octaves + 18
    sums = dealt((rows, ring)) + open_masked((rows, ring))
    octave = compare(rows * octaves, norm.COMPARE_BITS, masks=rows) + dealt((rows * octaves, 64), (rows * octaves, ring))
    mantissa = rescale(rows, ring, 2 * c_frac + size_bits - norm.MANTISSA_FRAC, norm.RING)
    mantissa += open_masked((rows, norm.RING), (rows, norm.INDEX_BITS))
    newton = dealt((rows * 2**norm.INDEX_BITS // 64, 64), (8 * rows, norm.RING)) + exchanged((rows, norm.RING))
    newton += rescale(rows, norm.RING, norm.MANTISSA_FRAC + 3 * norm.INDEX_FRAC + 1 - norm.INVERSE_FRAC, root_bits)
    inverse = open_masked((rows, root_bits)) + dealt((rows * octaves, root_bits)) + rescale(rows, root_bits, 8, ring)
    return (
        rescale(count, from_bits, frac + 24 - c_frac, ring)
        + open_masked((count, ring))
        + sums
        + octave
        + mantissa
        + newton
        + inverse
        + open_masked((rows, ring))
        + multiply(count, ring)
        + rescale(count, ring, c_frac + norm.INVERSE_FRAC + size_bits // 2 - frac, bits)
    )
