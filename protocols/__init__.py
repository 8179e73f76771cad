"""Protocols on shares and masked wires between two parties, over rings of 1 to 64 bits."""
