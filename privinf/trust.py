"""The trust models that a session may have: who makes the correlations, and who must not collude with whom; and how tokens are embedded."""

from __future__ import annotations

DEALER, TWO_PARTY = "dealer", "two-party"
TRUSTS = (DEALER, TWO_PARTY)
TEXTS = {
    DEALER: "semi-honest server, client and dealer; the dealer is a third party trusted not to collude with either",
    TWO_PARTY: "semi-honest server and client, and no third party",
}
"""Each in the words of reports."""

ONE_HOT, ENCRYPTED = "one-hot", "encrypted"
EMBEDDINGS = (ONE_HOT, ENCRYPTED)
"""How a token becomes a row of the server's table: a product with a one-hot row, or a ciphertext that the client has of each row.

The second is what two parties alone have; with a dealer it is a choice of the server's, and changes nothing of whom one has to trust.
"""
