"""The domains of M2D2 as the paper abbreviates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# the paper's split -> its abbreviation -> the data set's config, spelled as there; the first is
# trained on
PAPER = {
    "s2orc": {
        "MATH": "math_l1",
        "ART": "Art",
        "ASTRO": "astro-ph_l1",
        "CONDM": "cond-mat_l1",
        "CS": "cs_l1",
        "ECON": "econ_l1",
        "NLIN": "nlin_l1",
        "PHIL": "Philosophy",
        "PHYS": "physics_l1",
        "QBIO": "q-bio_l1",
        "STAT": "stat_l1",
    },
    "wiki": {
        "SOC": "Society_and_social_sciences",
        "CULT": "Culture_and_the_arts",
        "GEN": "General_referece",
        "HEALTH": "Health_and_fitness",
        "HIST": "History_and_events",
        "HUMAN": "Human_activites",
        "MATH": "Mathematics_and_logic",
        "NAT": "Natural_and_physical_sciences",
        "PHIL": "Philosophy_and_thinking",
        "REL": "Religion_and_belief_systems",
        "TECH": "Technology_and_applied_sciences",
    },
}


ABBREVIATIONS = {config: short for table in PAPER.values() for short, config in table.items()}


def short_names(domains: Iterable[str]) -> dict[str, str]:
    """Domain -> the paper's abbreviation in small letters, or its own name: no two are the same.

    MATH and PHIL stand for a domain of either split: where both are there, each keeps its name.
    """
    domains = list(dict.fromkeys(domains))
    short = {name: ABBREVIATIONS[name].lower() for name in domains if name in ABBREVIATIONS}
    taken = Counter([*short.values(), *(name for name in domains if name not in short)])
    return {name: s if (s := short.get(name, name)) and taken[s] == 1 else name for name in domains}
