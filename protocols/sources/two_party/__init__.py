"""Correlations that S and C make by themselves, by oblivious transfer and encrypted linear algebra.

`source` is the party's source; `pair` what a party has while it makes correlations; `shared` the toolbox over shared secrets;
`making` the registry of makers, of which there is a file for each file of protocols.
"""
