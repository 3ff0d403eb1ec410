"""The shape of the house: arrows between packages go down, imports make no circle, folders and files stay small."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# The packages that each may import beside itself. `hf_wsl` has two floors: the ground, and the door on top of all.
BELOW = {
    "modeling_wsl": set(),
    "hf_wsl": {"modeling_wsl"},
    "datasets_scripts": {"modeling_wsl", "hf_wsl"},
    "hub_cards": {"modeling_wsl", "hf_wsl", "datasets_scripts"},
    "trainers": {"modeling_wsl", "hf_wsl", "datasets_scripts"},
}
DOOR = "hf_wsl.cli"
# Leaf modules of `modeling_wsl` that the ground may use: they import neither torch nor a sibling.
LEAVES = {"modeling_wsl.files"}
MAX_FILES, MAX_LINES = 16, 600


def source_files() -> dict[str, Path]:
    """Module name -> file, of every module of the packages."""
    files = [path for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = source_files()


def imports(module: str) -> Iterator[str]:
    """The modules of the packages that a module imports; a name of a package's face counts as the face."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{origin}.{alias.name}"
                if target in MODULES:
                    yield target
                elif origin in MODULES:
                    yield origin


@pytest.mark.parametrize("package", BELOW)
def test_arrows_between_packages_go_down(package):
    allowed = BELOW[package] | {package}
    rising = [
        (module, target)
        for module in MODULES
        if module.split(".")[0] == package and module != DOOR
        for target in imports(module)
        if target.split(".")[0] not in allowed or target == DOOR
    ]
    assert rising == []


def test_the_ground_stands_on_leaf_modules_of_the_library_alone():
    used = {
        target
        for module in MODULES
        if module.startswith("hf_wsl") and module != DOOR
        for target in imports(module)
        if target.startswith("modeling_wsl")
    }
    assert used <= LEAVES
    for leaf in used:
        assert list(imports(leaf)) == [], leaf


def test_no_modules_import_each_other_in_a_circle():
    # A face that offers the names of its own folder is no circle.
    faces = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    try:
        TopologicalSorter({module: {*imports(module)} - faces for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_folder_has_too_many_files_and_no_file_too_many_lines():
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in MODULES.values())
    assert {folder: count for folder, count in folders.items() if count > MAX_FILES} == {}
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > MAX_LINES} == {}


def test_the_library_imports_modules_of_its_own_by_relative_names_only():
    # A saved backbone carries these files flat, without package faces: `from ..tokens import x` would find nothing.
    for module in MODULES:
        if not module.startswith("modeling_wsl") or MODULES[module].name == "__init__.py":
            continue
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module, f"{module}: imports from a package's face in line {node.lineno}"
                above = module.split(".")[: -node.level]
                target = MODULES.get(".".join([*above, node.module]))
                assert target and target.name != "__init__.py", f"{module}, line {node.lineno}: {node.module}"
