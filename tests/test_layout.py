"""The house keeps its shape: imports go one way, files stay small, slow and dangerous things stay out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "unetrkit"
FILES = sorted(SOURCE.rglob("*.py"))
# A room may import itself and the rooms that stand before it.
ORDER = (
    "errors",
    "ranks",
    "memory",
    "progress",
    "plain_yaml",
    "config",
    "info",
    "data",
    "fetch",
    "networks",
    "inference",
    "evaluation",
    "training",
    "pretraining",
    "studies",
    "deployment",
    "demo",
    "cli",
)
MAY_IMPORT = {room: set(ORDER[:place]) for place, room in enumerate(ORDER)}
MAY_IMPORT["networks"] = {"errors"}
MAY_IMPORT["data"] -= {"info"}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("unetrkit.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert imported_rooms(path) - {room} <= MAY_IMPORT[room]


def test_source_stays_small_enough_to_read():
    lines = {str(path.relative_to(SOURCE)): path.read_text().count("\n") for path in FILES}
    assert max(lines.values()) <= 310, max(lines, key=lines.__getitem__)
    assert sum(lines.values()) <= 18_660


def test_functions_take_at_most_eight_arguments():
    crowded = []
    for path in FILES:
        if room_of(path) == "cli":  # a command's options are its users' words
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                count = len(node.args.args) + len(node.args.kwonlyargs) + len(node.args.posonlyargs)
                count -= bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
                if count > 8:
                    crowded.append(f"{path.name}:{node.name} {count}")
    assert not crowded


@pytest.mark.parametrize(
    "pattern",
    [
        r"\beval\(",
        r"\bexec\(",
        r"yaml\.load\b",
        r"extractall",
        r"weights_only=False",
        r"pickle\.(load|loads|Unpickler)\b",
    ],
)
def test_dangerous_calls_are_absent(pattern):
    found = [
        f"{path.name}: {line.strip()}"
        for path in FILES
        for line in path.read_text().splitlines()
        if re.search(pattern, line.split("#")[0]) and ".eval()" not in line
    ]
    assert not found


@pytest.mark.parametrize(
    "command", [["--help"], ["train", "--help"], ["info", "recipes"], ["info", "environment"]]
)
def test_help_and_info_import_neither_torch_nor_monai(command):
    code = (
        f"import sys; sys.argv = ['unetrkit', *{command!r}]\n"
        "from unetrkit.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "slow = {'torch', 'monai', 'matplotlib', 'SimpleITK'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_readme_draws_the_layout_that_is_there():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## Layout")[1].split("```")[1]
    missing = [
        p for p in FILES if p.stem not in ("__init__", "__main__") and not re.search(rf"\b{p.stem}\b", tree)
    ]
    assert not missing
