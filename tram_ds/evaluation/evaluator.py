"""What a run is judged by: validation while it trains, final scores on every domain, the exported
weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tram_ds.checkpoint.adapter_export import add_merged, export_adapter, read_adapter
from tram_ds.checkpoint.export import export, read_export
from tram_ds.checkpoint.space import weights_bytes
from tram_ds.engines.protocol import Engine
from tram_ds.engines.shards import Shards
from tram_ds.evaluation import card, row_scores
from tram_ds.evaluation.card_facts import facts
from tram_ds.evaluation.measured import better, record_of
from tram_ds.evaluation.samples import generate
from tram_ds.evaluation.score import evaluate, zero_shot_average
from tram_ds.evaluation.selection import Selection
from tram_ds.models.pretrained import load_base
from tram_ds.recipe.recipe import Recipe
from tram_ds.runtime import run_folder
from tram_ds.runtime.files import write_whole
from tram_ds.runtime.jsonl import strict
from tram_ds.runtime.peers import Peers
from tram_ds.runtime.ranks import barrier, from_rank_0
from tram_ds.runtime.run_layout import RunFolder, partial

Scores = dict[str, dict[str, dict[str, float]]]  # split -> domain -> metric -> value


@dataclass
class Evaluator:
    """Scores the weights of an engine by a task. Every method is collective; files are written by
    rank 0."""

    recipe: Recipe
    task: Any
    engine: Engine
    folder: RunFolder
    beat: Callable[[str], None] = lambda _: None
    # what is scored and exported instead of theta, in the layout of params(); None: theta
    judged: Callable[[], Shards | None] = lambda: None
    # (bytes, what, collective action): runs it when the disk has room, see checkpoint.space
    room: Callable[[int, str, Callable[[], None]], None] = lambda _, __, action: action()

    @property
    def selection(self) -> Selection:
        """Which of the weights that were measured are the best, by the files of the folder."""
        return Selection(self.recipe.eval, self.folder)

    def validate(self) -> dict[str, Any]:
        """What measured.record_of says of the validation splits of eval.domains. By default nothing
        zero-shot takes part in selection."""
        trained, every = self.task.train_domains, self.recipe.eval.domains == "all"
        sets = self.task.eval_sets("validation").items()
        rows = {domain: found for domain, found in sets if every or domain in trained}
        with self._at(self.judged()):
            scores = self._evaluate(rows)
        # of one rank for all, who are to go one way by it
        return from_rank_0(lambda: record_of(scores, trained, every))

    def samples(self, weights: Shards | None) -> list[dict[str, str]]:
        """Continuations of eval.generate's prompts at `weights`; None: at theta."""
        wanted = self.recipe.eval.generate
        if wanted is None:
            return []
        self.beat("generating samples")
        batch = self.recipe.eval.batch or self.recipe.train.micro_batch
        with self._at(weights), self.engine.autocast():
            return generate(
                self.engine.model,
                self.task,
                wanted.prompts,
                wanted.max_tokens,
                batch,
                self.engine.device,
            )

    def _at(self, weights: Shards | None) -> AbstractContextManager[None]:
        """Inside, the model has `weights`; None: theta. Collective."""
        return nullcontext() if weights is None else self.engine.moved(to=weights)

    def score(self, kept: row_scores.Kept | None = None) -> Scores:
        """Every domain of every split of eval.splits. kept: gets the scores of their rows."""
        found = {}
        for split in self.recipe.eval.splits:
            of_split = {} if kept is None else kept.setdefault(split, {})
            found[split] = self._evaluate(self.task.eval_sets(split), of_split.__setitem__)
        return found

    def initial(self) -> Scores | None:
        """The scores before the first step, kept in a file for a run that is resumed."""
        file = self.folder.initial
        # after a resume the file has it: the weights of before the first step are gone
        if self.engine.steps == 0:
            self._write(self.folder.initial, self.score())
        return from_rank_0(lambda: json.loads(file.read_text()) if file.exists() else None)

    def _evaluate(
        self,
        rows: Mapping[str, Any],
        kept: Callable[[str, row_scores.RowScores], None] | None = None,
    ) -> dict[str, dict[str, float]]:
        batch = self.recipe.eval.batch or self.recipe.train.micro_batch
        engine = self.engine

        def progress(domain: str, done: int, _: int) -> None:
            self.beat(f"evaluation of {domain}, batch {done}")

        with engine.autocast():
            return evaluate(
                engine.model,
                self.task,
                rows,
                batch,
                engine.rank,
                engine.world_size,
                engine.device,
                engine.data_sum,
                progress,
                kept,
            )

    def keep_if_best(self, step: int, value: float) -> None:
        """Exports the weights to `best/` where their value of eval.key is the best so far."""
        key = self.recipe.eval.key
        # rank 0's file for all: an export is collective, and all have to come to it or none
        if better(key, value, from_rank_0(self.selection.best_alike).get(key)):
            found = {"step": step, key: value, **self.selection.kind()}
            self.export(self.folder.best, self.judged(), lambda: self._about(found))
            # after the weights: before them it would promise what is not there yet
            self._write(self.folder.best_loss, found)
        # at the end every rank reads best/ and this file: not before rank 0 has written them
        barrier()

    def export(self, to: Path, weights: Shards | None, known: Callable[[], card.Results]) -> None:
        """theta, or `weights` instead, in Hugging Face format, adapters in peft's, with the
        tokenizer or image processor beside them, and the card of what is known."""
        companion = self._beside(known)
        if self.recipe.model.lora is not None:
            self._in_room(
                to, lambda peers: export_adapter(self.engine, to, peers, companion, weights)
            )
            return
        files = self.recipe.export
        self._in_room(
            to,
            lambda peers: export(
                self.engine,
                to,
                peers,
                companion,
                dtype=getattr(torch, files.dtype),
                max_shard_size=files.max_shard_size,
                weights=weights,
                beat=self.beat,
            ),
        )

    def _beside(self, known: Callable[[], card.Results]) -> card.Beside:
        companion = getattr(self.task, "tokenizer", None) or getattr(self.task, "processor", None)
        return card.Beside(companion, self.recipe, known)

    def _about(self, selected: dict[str, Any]) -> dict[str, Any]:
        """What results.json says of a run beside its scores. Rank 0."""
        return {
            "train_domains": list(self.task.train_domains),
            "selected": selected,
            "trained": facts(self.recipe, self.task, self.engine),
        }

    def _in_room(self, to: Path, write: Callable[[Peers], None]) -> None:
        """write(peers), a collective that makes the folder `to`, when the disk has room;
        CheckpointError on all ranks alike where it fails."""
        peers = Peers(self.engine.world_size)
        try:
            bits = torch.finfo(getattr(torch, self.recipe.export.dtype)).bits
            # weights_bytes is of fp32
            needed = weights_bytes(self.engine.module) * bits // 32
            self.room(needed, f"writing {to}", lambda: write(peers))
        finally:
            peers.close()

    def conclude(
        self,
        initial: Scores | None,
        warnings: Callable[[], list[str]] = list,
        stopped_early: dict[str, Any] | None = None,
        resolved: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Scores and exports the selected weights; writes and returns results.json. warnings: asked
        on rank 0. stopped_early: {"step", "of", "why"} of a run that ended before its last step.
        resolved: recipe key -> what the run found for it.
        The export first, with the scores in its card, then those of single rows: results.json
        stands for all."""
        # asked on rank 0: read_export below or theta, the same on every rank
        measured = from_rank_0(lambda: self.selection.best_alike()["step"] >= 0)
        best = self.recipe.eval.select == "best" and measured
        read = read_export if self.recipe.model.lora is None else read_adapter
        weights = read(self.engine, self.folder.best) if best else self.judged()
        rows: row_scores.Kept = {}
        with self._at(weights):
            scores = self.score(rows)
        samples = self.samples(weights)
        selected = self.selection.selected(best, self.engine.steps)
        if "why" in selected and self.engine.rank == 0:
            print(f"eval.select = best: {selected['why']}")
        results = {
            **from_rank_0(lambda: self._about(selected)),
            "stopped_early": stopped_early,
            **self._measured(scores),
            "initial": initial,
            "samples": samples,
            "warnings": from_rank_0(warnings),
            "resolved": dict(resolved or {}),
        }
        if best:
            self._in_room(self.folder.export, lambda peers: self._publish_best(peers, results))
        else:
            self.export(self.folder.export, weights, lambda: results)
        if self.recipe.model.lora is not None and self.recipe.model.lora.merge:
            self._in_room(self.folder.export, lambda peers: self._merge(peers, results))
        if self.engine.rank == 0:
            write_whole(self.folder.rows, row_scores.packed(rows))
        # last: where results.json is, export and rows are too
        self._write(self.folder.results, results)
        return results

    def _publish_best(self, peers: Peers, results: card.Results) -> None:
        def copy() -> None:
            incomplete = partial(self.folder.export)
            run_folder.discard_export(incomplete)
            shutil.copytree(self.folder.best, incomplete)
            card.write(incomplete, self.recipe, results)
            run_folder.replace_export(incomplete, self.folder.export)

        peers.first(f"writing {self.folder.export}", copy)

    def _merge(self, peers: Peers, results: card.Results) -> None:
        def merge() -> None:
            # the base from its own files: an engine may hold it rounded to bf16
            base, files = self.task.model(load_base), self.recipe.export
            beside = self._beside(lambda: results)
            dtype = getattr(torch, files.dtype)
            add_merged(self.folder.export, base, dtype, files.max_shard_size, beside)

        self.beat("merging the adapters")
        peers.first(f"writing {self.folder.export}", merge)

    def _measured(self, scores: Scores) -> dict[str, Any]:
        return {
            # what the numbers depend on beyond the recipe
            "task": self.task.said() if hasattr(self.task, "said") else {},
            "scores": scores,
            "zero_shot_average": {
                split: self._averages(domains) for split, domains in scores.items()
            },
        }

    def _averages(self, domains: dict[str, dict[str, float]]) -> dict[str, float | None]:
        metrics = next(iter(domains.values()))
        averages = {m: zero_shot_average(domains, self.task.train_domains, m) for m in metrics}
        return {m: None if math.isnan(v) else v for m, v in averages.items()}

    def _write(self, file: Path, content: Any) -> None:
        if self.engine.rank == 0:
            write_whole(file, json.dumps(strict(content, []), indent=2) + "\n")
