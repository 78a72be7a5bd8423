"""Like with like: what a score is measured with, and the runs that were measured alike."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from tram_ds.comparison.measured_with import CHOICE, DATA, scoring
from tram_ds.comparison.run import Run

DIGEST = "data digest"
ALL = "all that was read"
NAMED = 3  # as many names in a title


def alike(runs: Sequence[Run], columns_are_data: bool, metric: str) -> list[tuple[str, list[Run]]]:
    """(what tells them apart, runs) of every group that was scored alike: "" where there is one.

    columns_are_data: each column is a data set of its own (images), so that only the other keys
    must agree. metric: a score, or an analysis, of which the settings count too.
    """
    left_out = DATA if columns_are_data else ()
    # resolved after the recipe: `auto` is compared by what it came to
    scored = [
        scoring(run.recipe, left_out) | run.resolved | run.settings.get(metric, {}) for run in runs
    ]
    _add_digests(runs, scored)
    differing = sorted(
        key for key in {k for s in scored for k in s} if len({s.get(key) for s in scored}) > 1
    )
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, said in zip(runs, scored, strict=True):
        groups[", ".join(f"{key} = {said.get(key, 'unset')}" for key in differing)].append(run)
    return list(groups.items())


def _add_digests(runs: Sequence[Run], scored: Sequence[dict[str, str]]) -> None:
    """Runs that read other content under one name, of a domain's split, are unlike; a run that did
    not read what differs between others is in no table with either."""
    read = _read(runs)
    digests: dict[str, set[str]] = defaultdict(set)
    for contents in read:
        for name, digest in contents.items():
            digests[name].add(digest)
    other = sorted(name for name, found in digests.items() if len(found) > 1)
    for said, contents in zip(scored, read, strict=True):
        if own := [name for name in other if name in contents]:
            said[DIGEST] = _told(own, contents)


def _told(names: Sequence[str], contents: Mapping[str, str]) -> str:
    """One digest for all of the names, which it says as far as a title has room."""
    # behind ALL stands the choice of domains, which tells digests apart and is not for people
    shown = [name.partition("\0")[0] for name in names[:NAMED]]
    if len(names) == 1:
        digest = contents[names[0]][:12]
        return digest if shown == [ALL] else f"{digest} of {shown[0]}"
    lines = "\n".join(f"{name}\0{contents[name]}" for name in names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    digest = hashlib.sha256(lines.encode()).hexdigest()[:12]
    return f"{digest} of {' '.join(shown)}{more}"


def _read(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What each run read, by name. Of a run that left one digest of everything: what a run of the
    same data and choice of domains and the same digest left by name; where there is none, the
    digest itself stands for all, between runs of that choice alone, since it says nothing between
    other choices."""
    read = [dict(run.contents) for run in runs]
    chosen: dict[str, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        task = run.recipe["task"]
        named = [task.get(key.partition(".")[2]) for key in (*DATA, *CHOICE)]
        # the scores too: `eval: null` is whatever domains the data had at the time
        chosen[json.dumps([*named, sorted(run.scores)], default=str)].append(i)
    for choice, members in chosen.items():
        whole = {i: runs[i].tags.get("data_digest") for i in members}
        known = {whole[i]: runs[i].contents for i in members if whole[i] and read[i]}
        for i in members:
            read[i] = read[i] or dict(known.get(whole[i], {}))
        # every run of the choice: one without names has nothing else to be compared by
        if not all(read[i] for i in members):
            for i in members:
                if (digest := whole[i]) is not None:
                    read[i][f"{ALL}\0{choice}"] = digest
    return read
