"""Make a data set: prompts through the filters, answers shard by shard, from where it was left."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspark.errors import DataError
from dspark.request import SamplingParams
from dspark.text import TextCodec
from dspark.training.data_answers import (
    Answer,
    Answerer,
    AnswerJob,
    QuestionJob,
    derive_seed,
    rows_of,
)
from dspark.training.data_filters import Drop
from dspark.training.data_manifest import QUESTIONS, SHARDS, DataFolder, shard_facts
from dspark.training.data_prompts import SELF, ChatForm, DataPrompt, PromptSieve, prompts_of_sets
from dspark.training.data_shards import Journal, Row
from dspark.training.data_spec import DataSpec
from dspark.training.data_turns import TurnMarks, question_marks

__all__ = ["DataRun", "Watcher"]

_LEAST_BLOCK = 16  # questions asked for at once
_SPARE = 1.25  # questions asked for, per question that is still missing
_MOST_TRIES = 20  # questions asked for, per question wanted, before giving up


class Watcher:
    """Is told what happens; this one does nothing with it."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A part of the work begins; `done` of it was done by an earlier run."""

    def advance(self, done: float, tokens: int) -> None:
        """So much of the stage is done; so many tokens were made since it began."""

    def shard(self, index: int, count: int, rows: int) -> None:
        """A shard was written: its number, how many there are, its rows."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class DataRun:
    """Makes a data set in a folder, or what is left of it.

    Args:
        folder: The folder.
        spec: What the set is made of.
        codec: The target's text codec.
        answerer: Makes the answers.
        watcher: Told what happens.

    Attributes:
        planned: Answers that the whole set wants, 0 until the prompts are known.
        finished: Answers that are safe in shards or in the journal.
        tokens: Response tokens that this run made.
        seconds: What it took to make them.

    Raises:
        ConfigError: If the folder was begun with other settings.
        DataError: If it cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: DataSpec,
        codec: TextCodec,
        answerer: Answerer,
        *,
        watcher: Watcher | None = None,
    ) -> None:
        self._spec = spec
        self._form = ChatForm(codec)
        self._answerer = answerer
        self._watcher = Watcher() if watcher is None else watcher
        # What cannot work is refused before anything is written.
        self._marks = question_marks(codec) if spec.own.count else None
        self.folder = DataFolder(folder, spec.begun(codec))
        self._is_ready = False
        self._question_tokens = 0
        self.planned = 0
        self.finished = 0
        self.tokens = 0
        self.seconds = 0.0

    def run(self) -> dict[str, Any]:
        """Make what is missing.

        Returns:
            The manifest of the complete set.

        Raises:
            DataError: If no prompt passes, or a file cannot be written.
            KeyboardInterrupt: Passed on; what is finished is kept.
        """
        spec, folder = self._spec, self.folder
        folder.save()
        prompts = self._prompts()
        self.planned = spec.plan.count(len(prompts))
        shards = math.ceil(self.planned / spec.shard_rows)
        missing = [i for i in range(shards) if folder.entry(SHARDS, i) is None]
        self.finished = sum(self._size(i) for i in range(shards) if i not in set(missing))
        if missing:
            folder.manifest["is_complete"] = False
            self._get_ready()
            self._watcher.stage("answers", self.planned, self.finished)
        for index in missing:
            self._make_shard(index, shards, prompts)
        folder.finish()
        counts = folder.manifest["counts"]["answers"]
        if not counts["rows"]:
            raise DataError(f"no answer passes the filters ({_listed(counts['dropped'])}).")
        return folder.manifest

    # -- prompts ------------------------------------------------------------------------------

    def _prompts(self) -> list[DataPrompt]:
        excluded = [t for own in self._spec.excluded for q in own.questions for t in q.turns]
        sieve = PromptSieve(self._form, self._spec.limits, excluded)
        found = prompts_of_sets(self._spec.sets)
        self._watcher.stage("prompts", len(found), 0)
        for number, prompt in enumerate(found, start=1):
            sieve.add(prompt)
            self._watcher.advance(number, 0)
        if self._marks is not None:
            self._write_questions(sieve, self._marks)
        sources = Counter(prompt.source for prompt in sieve.kept)
        self.folder.manifest["counts"]["prompts"] = {
            "kept": len(sieve.kept),
            "by_source": dict(sorted(sources.items())),
            "dropped": {k: dict(sorted(v.items())) for k, v in sorted(sieve.dropped.items())},
        }
        self.folder.save()
        if not sieve.kept:
            total: Counter[str] = sum(sieve.dropped.values(), Counter())
            raise DataError(f"no prompt passes the filters ({_listed(total)}).")
        return sieve.kept

    def _write_questions(self, sieve: PromptSieve, marks: TurnMarks) -> None:
        """Have the target write questions until enough of them pass."""
        wanted, asked, block, kept = self._spec.own.count, 0, 0, 0
        while kept < wanted:
            if asked >= _MOST_TRIES * wanted + _LEAST_BLOCK:
                self._watcher.note(
                    f"{kept} of {wanted} questions passed the filters in {asked} tries: "
                    "going on with these"
                )
                return
            size = max(_LEAST_BLOCK, math.ceil(_SPARE * (wanted - kept)))
            size = min(size, self._spec.shard_rows)
            for row in self._question_block(block, asked, size, marks, kept):
                if kept == wanted:
                    break  # one of the spare ones
                if row["drop"] is not None:
                    sieve.drop(SELF, Drop(row["drop"]))
                elif sieve.add(DataPrompt(source=SELF, turns=(row["text"],))) is None:
                    kept += 1
            asked += size
            block += 1

    def _question_block(
        self, block: int, start: int, size: int, marks: TurnMarks, kept: int
    ) -> list[Row]:
        """Rows of a block of questions, written now if they were not before."""
        if self.folder.entry(QUESTIONS, block) is not None:
            return self.folder.rows(QUESTIONS, block)
        self._get_ready()
        if not self._question_tokens:
            self._watcher.stage("questions", self._spec.own.count, kept)
        own, seed = self._spec.own, self._spec.plan.seed
        jobs = [
            QuestionJob(
                index=index,
                params=SamplingParams(
                    max_tokens=own.max_tokens,
                    temperature=own.temperature,
                    top_p=self._spec.plan.top_p,
                    seed=derive_seed(seed, SELF, index),
                ),
            )
            for index in range(start, start + size)
        ]
        share, before = (own.count - kept) / size, self._question_tokens

        def report(done: float, tokens: int) -> None:
            self._question_tokens = before + tokens
            self._watcher.advance(kept + done * share, self._question_tokens)

        written = self._answerer.write_questions(jobs, marks, report)
        rows = [asdict(question) for question in written]
        self.folder.install(QUESTIONS, block, rows, {})
        return rows

    # -- answers ------------------------------------------------------------------------------

    def _size(self, index: int) -> int:
        """Answers that a shard wants."""
        return min(self._spec.shard_rows, self.planned - index * self._spec.shard_rows)

    def _get_ready(self) -> None:
        """Load what answers, and make sure that it is what answered before."""
        if not self._is_ready:
            self.folder.settle_engine(self._answerer.facts())
            self.folder.save()
            self._is_ready = True

    def _make_shard(self, index: int, count: int, prompts: Sequence[DataPrompt]) -> None:
        spec = self._spec
        start = index * spec.shard_rows
        jobs = spec.plan.jobs(
            prompts,
            start,
            start + spec.shard_rows,
            max_prompt_tokens=spec.limits.max_prompt_tokens,
        )
        self._get_ready()
        with self._journal(index) as journal:
            kept = journal.found
            outcome = {job.index: kept[job.index] for job in jobs if job.index in kept}
            self.finished += len(outcome)
            self._answer([job for job in jobs if job.index not in outcome], outcome, journal)
            rows: list[Row] = []
            dropped: Counter[str] = Counter()
            for job in jobs:
                rows += outcome[job.index]["rows"]
                dropped.update(outcome[job.index]["dropped"])
            self.folder.install(SHARDS, index, rows, shard_facts(rows, dropped))
            journal.remove()
        if not self._answerer.keeps_partial:
            self.finished += len(jobs)
        self._watcher.shard(index, count, len(rows))

    @contextmanager
    def _journal(self, index: int) -> Iterator[Journal]:
        journal = self.folder.journal(index)
        if not self._answerer.keeps_partial:
            journal.found.clear()  # these answers depend on their neighbours: all of them again
        try:
            yield journal
        finally:
            journal.close()

    def _answer(self, jobs: Sequence[AnswerJob], outcome: dict[int, Row], journal: Journal) -> None:
        """Answer jobs and keep what comes of them."""
        before, keeps = self.finished, self._answerer.keeps_partial
        began, made = time.perf_counter(), self.tokens

        def keep(job: AnswerJob, answer: Answer) -> None:
            rows, dropped = rows_of(job, answer, self._spec.limits)
            outcome[job.index] = {"rows": rows, "dropped": dict(dropped)}
            if keeps:
                journal.append(job.index, rows, dropped)
                self.finished += 1
            if answer.message is not None:
                self._watcher.note(f"answer {job.index} failed: {answer.message}")

        def report(done: float, tokens: int) -> None:
            self.tokens = made + tokens
            self._watcher.advance(before + done, self.tokens)

        try:
            self._answerer.answer(jobs, keep, report)
        finally:
            self.seconds += time.perf_counter() - began


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
