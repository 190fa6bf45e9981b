"""The API reference, built from the docstrings of the public names: `python -m tests.project.reference FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import vnetdp
import vnetdp.testing


def build(folder: Path) -> None:
    """Write the reference into *folder*. ImportError without pdoc, which the extra `docs` brings.

    A member without a docstring is left out, and so is one whose docstring has @private.
    """
    import pdoc

    for package in (vnetdp, vnetdp.testing):
        for name in vars(package)["__all__"]:
            getattr(package, name)  # pdoc looks for names that are loaded
    pdoc.render.configure(
        docformat="markdown",
        include_undocumented=False,
        show_source=False,
        footer_text=f"vnetdp {vnetdp.__version__}",
    )
    modules = (
        "vnetdp",
        vnetdp.features.__name__,
        "vnetdp.testing",
        "vnetdp.testing.strategies",
        "vnetdp.testing.explore",
    )
    pdoc.pdoc(*modules, output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
