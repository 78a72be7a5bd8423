"""The embedded corpus: prose, in one split and one domain only, and the same every time."""

from __future__ import annotations

import stat

import pytest

from tram_ds.data import installed_docs
from tram_ds.data.choose import open_source
from tram_ds.data.installed_docs import cached_folder, corpus_digest, extract
from tram_ds.data.sources import FolderSource


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return cached_folder(tmp_path_factory.mktemp("cache"))


def paragraphs(source, domain, split):
    return "".join(source.read(domain, split)).splitlines()


def test_has_eight_domains_with_all_splits_of_prose(folder):
    source = FolderSource(folder)
    assert len(source.domains()) >= 8
    for domain in source.domains():
        for split in ("train", "valid", "test"):
            text = paragraphs(source, domain, split)
            assert text and all(len(p) >= 80 and ">>>" not in p for p in text)


def test_no_paragraph_is_in_two_places_not_even_with_another_ending_or_beginning(folder):
    source = FolderSource(folder)
    heads, tails, count = set(), set(), 0
    for domain in source.domains():
        for split in ("train", "valid", "test"):
            for paragraph in paragraphs(source, domain, split):
                letters = "".join(c for c in paragraph.lower() if c.isalpha())
                heads.add(letters[:60])
                tails.add(letters[-60:])
                count += 1
    assert len(heads) == len(tails) == count


def test_a_fuzzy_copy_is_dropped():
    words = [
        f"{a}{b}"
        for a in ("quick", "brown", "lazy", "jumping")
        for b in ("foxes", "wolves", "hounds", "dogs", "cats")
    ]
    first = " ".join(words * 3)
    changed = " ".join(["another", "beginning", *(words * 3), "another", "ending"])
    edges, shingles = set(), set()
    assert not installed_docs._is_copy(first, edges, shingles)
    assert installed_docs._is_copy(changed, edges, shingles)
    assert not installed_docs._is_copy(" ".join(reversed(changed.split())), edges, shingles)


def test_extraction_is_deterministic_and_capped():
    domains = ("python_reference", "networkx")
    one, two = extract(domains, train_chars=20_000), extract(reversed(domains), train_chars=20_000)
    assert corpus_digest(one) == corpus_digest(two)
    assert all(20_000 <= len(one[domain]["train"]) < 40_000 for domain in domains)
    assert corpus_digest(extract(domains, train_chars=10_000)) != corpus_digest(one)


def test_no_package_is_imported():
    import subprocess
    import sys

    code = (
        "import sys; from tram_ds.data.installed_docs import extract; extract(['sympy'], 30_000);"
        "print([m for m in ('sympy', 'torch', 'transformers') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[]"


def test_is_cached_and_private(folder, monkeypatch):
    monkeypatch.setattr(installed_docs, "extract", lambda: pytest.fail("extracted again"))
    source = open_source("installed_docs", folder.parent.parent)
    assert isinstance(source, FolderSource) and source.root == folder
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
