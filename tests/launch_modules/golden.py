"""Text that people paste into a cluster, compared with a file of what it should be."""

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def check_golden(name: str, text: str) -> None:
    """Compare with `tests/golden/NAME`; EPPLAN_WRITE_GOLDEN=1 writes it instead, for a review."""
    path = FOLDER / name
    if os.environ.get("EPPLAN_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs"
