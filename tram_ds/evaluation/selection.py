"""Which weights of a run are selected: the best so far by eval.key, or the last ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tram_ds.recipe.sections import EvalSection
from tram_ds.runtime import run_folder
from tram_ds.runtime.files import remove_file
from tram_ds.runtime.run_layout import RunFolder


@dataclass(frozen=True)
class Selection:
    """What the files of one run folder say of it. wanted: the recipe's section `eval`. No method is
    collective: on storage that ranks see late, rank 0's answer is the one."""

    wanted: EvalSection
    folder: RunFolder

    def selected(self, best: bool, steps: int) -> dict[str, Any]:
        """What results.json calls `selected`: the best, or the weights after `steps` steps.

        "why" is in it where the best was asked for and there is none.
        """
        last = {"step": steps, **self.kind()}
        if best or self.wanted.select != "best":
            return self.best() if best else last
        why = f"no {self.wanted.key} was finite: these are the last weights, not the best"
        return {**last, "why": why}

    def kind(self) -> dict[str, str]:
        """eval.weights, where it is not theta."""
        kind = self.wanted.weights
        return {} if kind == "last" else {"weights": kind}

    def best_alike(self) -> dict[str, Any]:
        """The best so far of the weights, and by the key, that are asked for now."""
        found = self.best()
        kind = found.get("weights", "last"), self.wanted.key in found
        return found if kind == (self.wanted.weights, True) else {"step": -1}

    def best(self) -> dict[str, Any]:
        """The step and value of the weights in `best/`; step -1 where there are none."""
        file = self.folder.best_loss
        return json.loads(file.read_text()) if file.exists() else {"step": -1}

    def go_back_to(self, step: int, total: int) -> None:
        """At a resume from `step` of `total`: what was measured later, on a way that is left now,
        is not selected, exported or shown any more, nor are the results of an end that is none.
        Changes files: rank 0 alone calls it."""
        for folder in (self.folder.best, self.folder.export):
            run_folder.restore_export(folder)
        if self.best()["step"] > step:
            print(f"the best weights so far were those of step {self.best()['step']}: dropped")
            run_folder.discard_export(self.folder.best)
            remove_file(self.folder.best_loss)
        results = self.folder.results
        if step < total and results.exists():
            if json.loads(results.read_text())["selected"]["step"] > step:
                run_folder.discard_export(self.folder.export)
            remove_file(results)
            # scores of single rows are of those results
            remove_file(self.folder.rows)
