"""`python -m vnetdp`."""

from .cli import main

raise SystemExit(main())
