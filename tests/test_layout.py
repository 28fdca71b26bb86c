"""The package list, the links and the import budget are what pyproject.toml promises."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSES = ("planner", "launcher", "runtime", "topologies")


def sources() -> list[Path]:
    folders = [ROOT / name for name in (*HOUSES, "tests", "benchmarks")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    own = ROOT / "epplan"
    return [*files, *own.glob("*.py"), *(own / "commands").glob("*.py")]


def test_package_list_names_every_package_on_disk() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {"epplan", "epplan.commands"}
    for house in HOUSES:
        for marker in (ROOT / house).rglob("__init__.py"):
            on_disk.add("epplan." + ".".join(marker.parent.relative_to(ROOT).parts))
    assert set(settings["packages"]) == on_disk
    for package, folder in settings["package-dir"].items():
        assert (ROOT / folder / "__init__.py").is_file(), package


@pytest.mark.parametrize("house", HOUSES)
def test_links_serve_tools_that_read_from_disk(house: str) -> None:
    link = ROOT / "epplan" / house
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert link.resolve() == ROOT / house


def test_nothing_imports_a_house_by_its_bare_name_or_by_its_parent() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path}:{node.lineno}: write from epplan.<house>"
                names = [node.module or ""] if not node.level else []
            for name in names:
                assert name.split(".")[0] not in HOUSES, f"{path}: import epplan.{name}"


ALLOWED = {
    "topologies": {"topologies"},
    "planner": {"topologies", "planner"},
    "launcher": {"topologies", "planner", "launcher"},
    "runtime": {"planner", "launcher", "runtime"},
}


@pytest.mark.parametrize("house", HOUSES)
def test_data_flows_one_way(house: str) -> None:
    for path in (ROOT / house).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("epplan."):
                other = (node.module or "").split(".")[1]
                assert other not in HOUSES or other in ALLOWED[house], f"{path} imports {other}"


HEAVY = ("torch", "numpy", "scipy", "networkx", "pulp", "highspy", "pydantic", "yaml", "rich")


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("from epplan.cli import cli; cli(['--help'], standalone_mode=False)") == []


def test_planner_imports_no_torch() -> None:
    assert "torch" not in imported_by("import epplan.planner.assemble")


def imported_by(code: str) -> list[str]:
    report = f"import sys; print([x for x in {HEAVY!r} if x in sys.modules])"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules: list[str] = ast.literal_eval(output.splitlines()[-1])
    return modules
