"""``lightning-sentinel benchmark detection``: which attacks are found, how soon, and at what cost.

A *scenario* describes one run; a *suite* is a list of them. Every run goes on from an honest warm-up, which runs that differ only
in the attack or in the response share, is measured, and leaves one file. Tables and figures are made from these files.
"""
