"""The one place that removes and replaces: what it takes, what it leaves; and there is no other."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from tram_ds.checkpoint import commits
from tram_ds.checkpoint import files as checkpoints
from tram_ds.runtime import files

ROOT = Path(__file__).resolve().parents[2]
PLACE = "tram_ds/runtime/files.py"
REMOVES = {"rmtree", "unlink", "rmdir", "removedirs", "truncate", "ftruncate", "move"}
REPLACES = {"rename", "renames", "replace"}  # of os, or of a Path with the one argument it takes
ELSEWHERE = {  # file, call, and why it is none of those
    ("tram_ds/tracking/metrics_log.py", "ftruncate"): "a line that a full disk cut short",
    ("tram_ds/tracking/metrics_log.py", "truncate"): "the line a killed process was writing",
    ("tram_ds/comparison/versus.py", "rename"): "a column of a table",
}


def removals(code: str) -> list[str]:
    """The calls in it that could cost somebody a file."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        one = len(node.args) == 1 and not node.keywords
        replacing = name in REPLACES and (owner == "os" or one)
        if name in REMOVES or replacing or (owner, name) == ("os", "remove"):
            found.append(name)
        if name in ("TemporaryDirectory", "mkdtemp", "NamedTemporaryFile"):
            # without a folder of its own choosing it is the system's place for such things
            found += [name] * any(k.arg == "dir" for k in node.keywords)
    return found


def test_nothing_is_removed_or_replaced_but_in_one_place() -> None:
    found = set()
    for part in ("tram_ds", "launch"):
        for path in sorted((ROOT / part).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            found |= {(name, call) for call in removals(path.read_text()) if name != PLACE}
    assert found <= set(ELSEWHERE), "ask runtime/files.py, and say in docs/faults.md what goes"
    assert removals((ROOT / PLACE).read_text())


@pytest.mark.parametrize(
    "code",
    [
        "shutil.rmtree(x)",
        "Path(x).unlink()",
        "os.remove(x)",
        "p.rename(q)",
        "os.replace(a, b)",
        "import tempfile\nwith tempfile.TemporaryDirectory(dir=run): pass",
        "shutil.move(a, b)",
    ],
)
def test_the_search_finds_them(code: str) -> None:
    assert removals(code)
    assert not removals("text.replace('a', 'b')\ntempfile.TemporaryDirectory(prefix='x')")


def test_a_tree_goes_only_where_all_of_it_is_ours(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    (tree / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (tree / "a.bin", tree / "sub" / "b.bin", outside / "c.bin"):
        path.touch()
    ours = {"a.bin", "b.bin"}

    def known(path: Path) -> bool:
        return path.name in ours

    notes = tree / "sub" / "notes.txt"
    notes.touch()
    assert not files.remove_tree(tree, known) and notes.exists() and (tree / "a.bin").exists()
    notes.unlink()
    (tree / "link").symlink_to(outside)
    assert not files.remove_tree(tree, known), "a link is somebody's"
    assert not files.remove_tree(tree / "link", lambda _: True), "and is not followed"
    ours.add("link")
    assert files.remove_tree(tree, known) and not tree.exists()
    assert (outside / "c.bin").exists()


def test_nothing_is_published_or_set_aside_over_what_is_there(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        files.publish(tmp_path / "new", tmp_path / "old")
    with pytest.raises(FileExistsError):
        files.set_aside(tmp_path / "new", tmp_path / "old")
    os.symlink("nowhere", tmp_path / "dangling")
    with pytest.raises(FileExistsError):
        files.set_aside(tmp_path / "new", tmp_path / "dangling")
    assert (tmp_path / "old" / "file").read_text() == "old"


def test_retention_leaves_a_checkpoint_that_somebody_keeps_notes_in(tmp_path: Path) -> None:
    where = checkpoints.prepare(tmp_path)
    for step in (1, 2, 3):
        partial = checkpoints.begin(where, step)
        checkpoints.commit(partial, {"step": step, "files": {}}, keep=1)
        if step == 1:
            (where / commits.name(1) / "notes.txt").write_text("the good one")
    assert [p.name for p in commits.candidates(tmp_path)] == ["step-00000003", "step-00000001"]
    assert (where / "step-00000001" / "notes.txt").read_text() == "the good one"
