"""The support matrix of BackPACK and the truth of its entries: `python -m tests.backpack_support` prints its two tables."""
