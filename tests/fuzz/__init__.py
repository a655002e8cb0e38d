"""Seeded calls of the whole package with good, bad and absurd input: `python -m tests.fuzz --calls 10000 --seed 0`.

A call is accepted (then its result is compared with an independent truth), refused (an InputError of one line, and nothing
has changed), or a fault. Each is a function of (seed, area, index) alone, so that any of them can be repeated:
`python -m tests.fuzz --seed 0 --area pooling --only 17`.
"""
