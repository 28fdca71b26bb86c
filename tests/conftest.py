"""The option --slow, without which tests that mostly wait are left out."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="Run tests that take their time, too.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes its time: run with --slow (make test-all)")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)
