"""M2D2 in every layout it comes in: the hub's archives, folders of them, text folders, the
test-only archive."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from tram_ds.data import hub, m2d2, m2d2_archive, m2d2_names
from tram_ds.data.choose import open_source
from tram_ds.data.sources import HUB_ID
from tram_ds.recipe import loading
from tram_ds.runtime.errors import DataError

TEXT = {
    "train": "First line of math.\n\n  indented, trailing \n" + "é = mc² " * 300 + "\n",
    "valid": "held out\nline two\n",
    "test": "tested\ncut inside a charact\u00e9r",
}


def pack(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def members(domain: str, cut: int = 0) -> dict[str, bytes]:
    """As in the hub's data/<domain>.tar.gz; the test split loses its last `cut` bytes."""
    content = {f"{domain}/{split}.txt": text.encode() for split, text in TEXT.items()}
    content[f"{domain}/test.txt"] = content[f"{domain}/test.txt"][: -cut or None]
    return content


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    pack(tmp_path / "data" / "math_l1.tar.gz", members("math_l1"))
    pack(tmp_path / "data" / "Art.tar.gz", members("Art"))
    return tmp_path / "data"


def put_in_hub_cache(root: Path, repo: str, files: dict[str, Path | bytes]) -> None:
    """The layout of the hub client's cache: refs, blobs and a snapshot of links."""
    base, commit = root / f"datasets--{repo.replace('/', '--')}", "a" * 40
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / "main").write_text(commit)
    (base / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = base / "blobs" / f"{len(list((base / 'blobs').iterdir())):064x}"
        blob.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        link = base / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The hub's client with an empty cache and no network, as under HF_HUB_OFFLINE=1."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_the_table_has_the_papers_domains_and_the_recipes_use_them():
    assert [len(table) for table in m2d2_names.PAPER.values()] == [11, 11] and len(
        m2d2_names.ABBREVIATIONS
    ) == 22
    for name, split in [
        ("m2d2_s2orc_gpt2", "s2orc"),
        ("m2d2_wiki_gpt2", "wiki"),
        ("m2d2_gpt2xl", "s2orc"),
    ]:
        task = loading.load(name).task
        configs = list(m2d2_names.PAPER[split].values())
        assert task.train == configs[0] and set(task.eval or []) == set(configs[1:])


def test_the_hubs_archives_are_read_through_its_cache(offline_hub, folder, cache):
    put_in_hub_cache(offline_hub, HUB_ID, {"data/math_l1.tar.gz": folder / "math_l1.tar.gz"})
    source = open_source(HUB_ID, cache)
    assert len(source.domains()) == 22 and source.splits("math_l1") == ["train", "valid", "test"]
    for split, text in TEXT.items():
        assert "".join(source.read("math_l1", split)) == text
    local = open_source(str(folder), cache)
    assert (
        source.digest("math_l1", "test")
        == local.digest("math_l1", "test")
        != source.digest("math_l1", "valid")
    )


def test_a_hub_that_cannot_be_reached_says_which_file_to_put_where(offline_hub, cache):
    message = (
        r"data/Art\.tar\.gz of .*machelreid/m2d2.*put Art\.tar\.gz.*set "
        r"task\.data.*HF_HUB_OFFLINE=1"
    )
    with pytest.raises(DataError, match=message):
        open_source(HUB_ID, cache).read("Art", "test")
    with pytest.raises(DataError, match=r"at revision abc.*HF_HUB_OFFLINE=1"):
        open_source(HUB_ID, cache, "abc").digest("Art", "test")
    with pytest.raises(DataError, match=r"x/y.*no such|x/y.*HF_HUB_OFFLINE=1"):
        hub.hub_files("x/y", "*.parquet", None, "do that")


@pytest.mark.parametrize("clone", [False, True])
def test_a_folder_of_archives_equals_the_folder_of_their_text(folder, tmp_path, cache, clone):
    text = tmp_path / "text"
    for domain in ("math_l1", "Art"):
        for name, content in members(domain, cut=1).items():
            (text / name).parent.mkdir(parents=True, exist_ok=True)
            (text / name).write_bytes(content)
        pack(folder / f"{domain}.tar.gz", members(domain, cut=1))
    packed = open_source(str(folder.parent if clone else folder), cache)
    plain = open_source(str(text), cache)
    assert packed.domains() == plain.domains() == ["Art", "math_l1"]
    for domain in plain.domains():
        for split in plain.splits(domain):
            assert "".join(packed.read(domain, split)) == "".join(plain.read(domain, split))


def test_bytes_cut_inside_a_character_are_replaced(tmp_path, cache):
    content = {"Art/test.txt": "é".encode() * 10 + "é".encode()[:1]}
    source = open_source(str(pack(tmp_path / "Art.tar.gz", content)), cache)
    assert "".join(source.read("Art", "test")) == "é" * 10 + "\ufffd"


def test_the_test_only_archive_adds_its_domains(folder, cache):
    content = {
        f"m2d2_test_sets/{d}/test.txt": f"{d} only tested\n".encode() for d in ("cs_l1", "Art")
    }
    archive = pack(folder / m2d2.TEST_SETS, content)
    source = open_source(str(folder), cache)
    assert source.domains() == ["Art", "cs_l1", "math_l1"] and source.splits("cs_l1") == ["test"]
    assert "".join(source.read("cs_l1", "test")) == "cs_l1 only tested\n"
    assert "".join(source.read("Art", "test")) == TEXT["test"], "a domain's own archive comes first"
    alone = open_source(str(archive), cache)
    assert (
        alone.domains() == ["Art", "cs_l1"]
        and "".join(alone.read("Art", "test")) == "Art only tested\n"
    )


def test_a_text_folder_comes_before_an_archive(folder, cache):
    (folder / "Art").mkdir()
    (folder / "Art" / "test.txt").write_text("edited\n")
    source = open_source(str(folder), cache)
    assert (
        "".join(source.read("Art", "test")) == "edited\n"
        and "".join(source.read("Art", "valid")) == TEXT["valid"]
    )


@pytest.mark.parametrize(
    "content, links, message",
    [
        ({"../outside/train.txt": b"x"}, {}, r"'\.\./outside/train\.txt' points outside"),
        ({"/etc/train.txt": b"x"}, {}, r"'/etc/train\.txt' points outside"),
        ({"Art/../../train.txt": b"x"}, {}, "points outside"),
        ({"Art/valid.txt": b"x"}, {"Art/train.txt": "/etc/passwd"}, r"'Art/train\.txt' is a link"),
        ({"Art/valid.txt": b"x"}, {}, "no train split of domain 'Art'; it has valid"),
        ({"art/train.txt": b"x"}, {}, "unknown domain 'Art'.*did you mean 'art'"),
        ({}, {}, "unknown domain 'Art'.*it has nothing"),
    ],
)
def test_unsafe_or_incomplete_archives_are_refused(tmp_path, cache, content, links, message):
    source = open_source(str(pack(tmp_path / "Art.tar.gz", content, links)), cache)
    with pytest.raises(DataError, match=message):
        source.read("Art", "train")
    with pytest.raises(DataError, match=message):
        source.digest("Art", "train")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty"])
def test_a_damaged_archive_is_refused_before_any_of_it_is_used(folder, cache, damage):
    archive = folder / "Art.tar.gz"
    data = pack(archive, {"Art/train.txt": os.urandom(50_000), "Art/test.txt": b"x"}).read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    archive.write_bytes(
        {"truncated": data[:middle], "flipped": flipped, "text": b"no archive", "empty": b""}[
            damage
        ]
    )
    with pytest.raises(DataError, match=r"Art\.tar\.gz is damaged.*get it again"):
        open_source(str(folder), cache).read("Art", "train")
    pack(archive, members("Art"))
    assert "".join(open_source(str(folder), cache).read("Art", "test")) == TEXT["test"]


def test_the_checksum_is_checked_also_behind_a_long_end(folder, cache):
    archive = folder / "Art.tar.gz"
    padded = gzip.compress(gzip.decompress(archive.read_bytes()) + bytes(3 << 20))
    archive.write_bytes(padded)
    assert "".join(open_source(str(folder), cache).read("Art", "test")) == TEXT["test"]
    archive.write_bytes(padded[:-8] + bytes(4) + padded[-4:])
    with pytest.raises(DataError, match=r"Art\.tar\.gz is damaged.*CRC"):
        open_source(str(folder), cache).read("Art", "test")


def test_an_archive_is_scanned_once(folder, cache, monkeypatch):
    first = open_source(str(folder), cache).digest("Art", "test")
    monkeypatch.setattr(m2d2_archive, "_scan", lambda _: pytest.fail("scanned again"))
    assert open_source(str(folder), cache).digest("Art", "test") == first


def test_a_revision_is_for_the_hub_only(folder, cache):
    with pytest.raises(DataError, match=r"task\.revision abc is for data on the hub.*remove it"):
        open_source(str(folder), cache, "abc")


@pytest.mark.parametrize(
    "domain, message", [("astro-ph", "did you mean 'astro-ph_l1'"), ("../x", "not a domain name")]
)
def test_unknown_domains_are_named(cache, domain, message):
    with pytest.raises(DataError, match=message):
        open_source(HUB_ID, cache).read(domain, "test")
