"""The embedded corpus: prose from the documentation every installation of this project brings
along.

One domain per package. Docstrings are read with `ast` from the source files, so no package is
imported. Paragraphs are joined to one line each, filtered for prose and deduplicated fuzzily across
all domains, then split by their hash: no paragraph, nor a near copy, is in two splits or two
domains. The text depends on the installed versions: log the digest.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tram_ds.data.cache import build_once, cache_root, digest_of
from tram_ds.runtime.errors import DataError

VERSION = 1  # raise it when the extraction changes: it is part of the cache key
PACKAGES = {  # domain (and import name) -> distribution that names its version
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "sqlalchemy": "SQLAlchemy",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
DOMAINS = ("python_library", "python_reference", *PACKAGES)
TRAIN_CHARS = 800_000  # per domain; valid and test follow at about a twentieth each
SOURCE_CHARS = 6_000_000  # source read per domain: bounds the time
HELD_OUT_PERCENT = 6  # of the paragraphs, for each of valid and test
SKIP = {
    "tests",
    "test",
    "testing",
    "_internal",
    "site-packages",
    "dist-packages",
    "idlelib",
    "turtledemo",
    "lib2to3",
}

_HEADING = re.compile(r"^.*\n[ \t]*[-=~^*]{3,}[ \t]*$", re.MULTILINE)  # a title and its underline
_NEITHER_LETTER_NOR_SPACE = re.compile(r"(?:[^\w ]|[\d_])+")
_NOT_A_LETTER = re.compile(r"[\W\d_]+")


def cached_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """A folder `<domain>/{train,valid,test}.txt` of the corpus, extracted on first use (seconds)
    and then kept."""
    path = (
        cache_root(cache_dir)
        / "installed_docs"
        / digest_of(VERSION, platform.python_version(), *_versions())
    )

    def build(folder: Path) -> None:
        with _collector_paused():
            corpus = extract()
        for domain, splits in corpus.items():
            (folder / domain).mkdir(mode=0o700)
            for split, text in splits.items():
                (folder / domain / f"{split}.txt").write_text(text, encoding="utf-8", newline="\n")
        sizes = {
            domain: {split: len(text) for split, text in splits.items()}
            for domain, splits in corpus.items()
        }
        manifest = {"versions": _versions(), "characters": sizes, "sha256": corpus_digest(corpus)}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    return build_once(path, build, lambda folder: (folder / "manifest.json").is_file())


def extract(
    domains: Iterable[str] = DOMAINS, train_chars: int = TRAIN_CHARS
) -> dict[str, dict[str, str]]:
    """domain -> {train, valid, test} -> text, one paragraph per line; domains that are not
    installed are left out."""
    seen_edges: set[str] = set()
    seen_shingles: set[int] = set()
    corpus = {}
    # in one order: the first domain that has a paragraph keeps it, and near copies are dropped
    for domain in sorted(domains):
        splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        room = train_chars
        for paragraph in _paragraphs(_documents(domain)):
            if _is_copy(paragraph, seen_edges, seen_shingles):
                continue
            split = _split_of(paragraph)
            splits[split].append(paragraph)
            room -= len(paragraph) + 1 if split == "train" else 0
            if room <= 0:
                break
        if all(splits.values()):
            corpus[domain] = {split: "\n".join(lines) + "\n" for split, lines in splits.items()}
    if not corpus:
        raise DataError(
            "installed_docs found no documentation on this machine; set task.data to a folder of "
            "domains"
        )
    return corpus


def corpus_digest(corpus: dict[str, dict[str, str]]) -> str:
    """sha256 (hex) of the whole corpus."""
    return hashlib.sha256(
        json.dumps(corpus, sort_keys=True, ensure_ascii=True).encode()
    ).hexdigest()


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Without cyclic garbage collection: syntax trees hold no cycles, and beside torch it would
    double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _versions() -> list[str]:
    found = []
    for name in PACKAGES.values():
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return found


def _documents(domain: str) -> Iterator[str]:
    """The documentation strings of one domain, in an order that depends on its files alone."""
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    if domain == "python_reference":
        topics = standard_library / "pydoc_data" / "topics.py"
        yield from _strings(topics, everything=True) if topics.is_file() else ()
        return
    if domain == "python_library":
        roots = [standard_library]
    else:
        spec = importlib.util.find_spec(domain)  # a top-level name: nothing is imported
        roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    budget = SOURCE_CHARS
    for root in roots:
        for path in _source_files(root):
            if domain == "python_library" and "pydoc_data" in path.parts:
                continue
            yield from _strings(path)
            budget -= path.stat().st_size
            if budget <= 0:
                return


def _source_files(root: Path) -> list[Path]:
    """Python files under `root`, shallow ones first (the public face of a package), without
    tests."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in SKIP and not name.startswith((".", "__"))
        ]
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: (len(path.parts), path.relative_to(root).as_posix()))


def _strings(path: Path, everything: bool = False) -> Iterator[str]:
    """Docstrings of a file, and the strings of its top-level calls (`add_docstr(f, "...")`); or
    every string in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    if everything:
        yield from (
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        )
        return
    todo: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while todo:
        node = todo.pop()
        yield ast.get_docstring(node) or ""
        # a stack: reversed, so that docstrings come in the order of the file
        for child in reversed(node.body):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                todo.append(child)
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call) and node is tree:
                strings = (n.value for n in ast.walk(child) if isinstance(n, ast.Constant))
                yield from (value for value in strings if isinstance(value, str))


def _paragraphs(documents: Iterable[str]) -> Iterator[str]:
    """Prose paragraphs, each on one line: >= 80 characters, no doctest, >= 80 % letters and
    spaces."""
    for document in documents:
        if len(document) < 80:
            continue
        for block in re.split(r"\n\s*\n", _HEADING.sub("\n", inspect.cleandoc(document))):
            paragraph = " ".join(block.split())
            if len(paragraph) < 80 or ">>>" in paragraph:
                continue
            if len(_NEITHER_LETTER_NOR_SPACE.sub("", paragraph)) >= 0.8 * len(paragraph):
                yield paragraph.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates


def _is_copy(paragraph: str, seen_edges: set[str], seen_shingles: set[int]) -> bool:
    """Whether a near copy came before; records the paragraph if not.

    A near copy shares its first or its last 60 letters, or half of its sampled runs of six words.
    """
    letters = _NOT_A_LETTER.sub("", paragraph.lower())
    edges = {"head " + letters[:60], "tail " + letters[-60:]}
    shingles = _shingles(paragraph)
    if edges & seen_edges or 2 * len(shingles & seen_shingles) > len(shingles):
        return True
    seen_edges |= edges
    seen_shingles |= shingles
    return False


def _shingles(paragraph: str) -> set[int]:
    """Hashes of the runs of six words that begin with a long one: a sample on which copies
    agree."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    return {
        zlib.crc32(" ".join(words[i : i + 6]).encode())
        for i in range(len(words) - 5)
        if len(words[i]) > 6
    }


def _split_of(paragraph: str) -> str:
    percent = int.from_bytes(hashlib.sha256(paragraph.encode()).digest()[:4], "big") % 100
    return (
        "test"
        if percent < HELD_OUT_PERCENT
        else "valid"
        if percent < 2 * HELD_OUT_PERCENT
        else "train"
    )
