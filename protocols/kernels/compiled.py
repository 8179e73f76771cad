"""All compiled functions."""

from protocols.kernels.elements import counters as counters
from protocols.kernels.elements import counters_many as counters_many
from protocols.kernels.elements import pack as pack
from protocols.kernels.elements import pack_rest as pack_rest
from protocols.kernels.elements import product as product
from protocols.kernels.elements import product_transposed as product_transposed
from protocols.kernels.elements import uniform as uniform
from protocols.kernels.elements import uniform_many as uniform_many
from protocols.kernels.elements import unpack as unpack
from protocols.kernels.elements import unpack_many as unpack_many
from protocols.kernels.steps import chosen_line as chosen_line
from protocols.kernels.steps import differences as differences
from protocols.kernels.steps import exponential as exponential
from protocols.kernels.steps import joint as joint
from protocols.kernels.steps import masked_bit as masked_bit
from protocols.kernels.steps import mixed as mixed
from protocols.kernels.steps import narrow_digit as narrow_digit
from protocols.kernels.steps import patterns as patterns
from protocols.kernels.steps import read as read
from protocols.kernels.steps import rescaled as rescaled
from protocols.kernels.steps import scored as scored
from protocols.kernels.steps import selected as selected
from protocols.kernels.steps import shift_right as shift_right
from protocols.kernels.steps import thresholds as thresholds
from protocols.kernels.steps import top_masked as top_masked
from protocols.kernels.steps import wide_digit as wide_digit
