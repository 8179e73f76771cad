"""The trust models that a session may have: who makes the correlations, and who must not collude with whom."""

from __future__ import annotations

DEALER, TWO_PARTY = "dealer", "two-party"
TRUSTS = (DEALER, TWO_PARTY)
TEXTS = {
    DEALER: "semi-honest server and client; the dealer is a third party trusted only not to collude",
    TWO_PARTY: "two parties alone, semi-honest",
}
"""Each in the words of reports."""
