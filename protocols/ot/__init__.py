"""Oblivious transfer between the two parties: base transfers, their extension, and what protocols ask of them (`transfers`)."""
