"""Live migration of a device, its guest and its rings to another process (docs/migration.md).

Read in this order: `snapshot` (a device's state), `stream` (sections), `ram` (guest memory), `machine` (what
migrates), `source` and `target` (the two sides), `seed` (the patch as written).
"""
