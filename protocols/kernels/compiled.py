"""All compiled functions."""

from protocols.kernels.elements import counters as counters
from protocols.kernels.elements import counters_many as counters_many
from protocols.kernels.elements import pack as pack
from protocols.kernels.elements import product as product
from protocols.kernels.elements import product_transposed as product_transposed
from protocols.kernels.elements import uniform as uniform
from protocols.kernels.elements import uniform_many as uniform_many
from protocols.kernels.elements import unpack as unpack
from protocols.kernels.elements import unpack_many as unpack_many
