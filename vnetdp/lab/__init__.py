"""The laboratory: two hosts, a machine that moves between them under traffic, and all that can go wrong (docs/migration.md).

Read in this order: `changes` (a guest changes its device meanwhile), `invariants` (true after each hand-over), `host` (one
side as a process of its own), `couple` (both, and a migration watched from outside), `matrix` (each point of failure),
`campaigns` (many cases on many processes).
"""

from .campaigns import campaign as campaign
