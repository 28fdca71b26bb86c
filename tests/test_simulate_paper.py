"""docs/paper.md is what benchmarks/paper.py writes."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("paper", ROOT / "benchmarks" / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    paper = importlib.util.module_from_spec(spec)
    sys.modules["paper"] = paper
    spec.loader.exec_module(paper)
    page = (ROOT / "docs" / "paper.md").read_text()
    assert paper.page() == page, "run `python benchmarks/paper.py -o docs/paper.md`"
