"""A whole evaluation: target x drafts x prompt sets x sampling, resumed where it was left."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dspark.engine import Engine
from dspark.errors import ConfigError
from dspark.eval.acceptance import (
    CONTEXT_EDGES,
    acceptance,
    by_category,
    by_context,
    check_edges,
)
from dspark.eval.confidence import confidence
from dspark.eval.definitions import apply_definition, check_definition
from dspark.eval.log import RunLog, settings_key
from dspark.eval.prompts import PromptSet, Question
from dspark.eval.records import QuestionRecord, all_rounds
from dspark.eval.results import RunFacts, build_header, describe_params, describe_prompts
from dspark.eval.runner import Runner, eval_engine, explicit_params
from dspark.request import SamplingParams

__all__ = ["SCHEMA", "VERSION", "Campaign", "Configuration", "Outcome", "configurations"]

SCHEMA = "dspark.eval"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One cell of an evaluation.

    Attributes:
        draft: As --draft.
        prompts: The prompt set.
        params: Sampling parameters.
    """

    draft: str
    prompts: PromptSet
    params: SamplingParams

    @property
    def name(self) -> str:
        """What tables call it."""
        shape = "" if self.params.width is None else f" width {self.params.width}"
        if self.params.tree_budget is not None:
            shape += f" budget {self.params.tree_budget}"
        law = f"T={self.params.temperature:g}"
        if self.params.temperature > 0 and self.params.rule != "auto":
            law += f" {self.params.rule}"
        return f"{self.draft}{shape} {law} {self.prompts.name}"

    @property
    def model_id(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^\w.-]+", "-", self.name.replace("T=", "temp-")).strip("-.")


def configurations(
    drafts: Sequence[str],
    prompts: Sequence[PromptSet],
    params: Sequence[SamplingParams],
    definitions: Sequence[str] = (),
) -> list[Configuration]:
    """Every draft with every prompt set and every kind of sampling.

    Args:
        drafts: As --draft.
        prompts: Prompt sets.
        params: Kinds of sampling.
        definitions: Definitions asked for; they may settle the rule.

    Raises:
        ConfigError: If a definition is not known or does not go with the rule, or a cell is named
            twice.
    """
    settled = []
    for own in params:
        for name in definitions:
            own = check_definition(name, own)
        settled.append(own)
    cells = [
        Configuration(draft=draft, prompts=asked, params=own)
        for draft, asked, own in itertools.product(drafts, prompts, settled)
    ]
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"the configuration {twice!r} was asked for twice.")
    return cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One configuration's records and figures.

    Attributes:
        configuration: Which.
        records: One per question.
        figures: What stands in the result file.
    """

    configuration: Configuration
    records: tuple[QuestionRecord, ...]
    figures: dict[str, Any]


class Campaign:
    """Runs configurations of one target one after the other.

    Args:
        facts: What the engine cannot tell of the run.
        log: Where finished questions are kept, or None.
        definitions: Definitions to compute besides our own.
        context_edges: Where context-length buckets end.
    """

    def __init__(
        self,
        facts: RunFacts,
        *,
        log: RunLog | None = None,
        definitions: Sequence[str] = (),
        context_edges: Sequence[int] = CONTEXT_EDGES,
    ) -> None:
        check_edges(context_edges)
        self._facts = facts
        self._log = log
        self._definitions = tuple(definitions)
        self._edges = tuple(context_edges)
        self.header: dict[str, Any] = {}

    def run(
        self,
        engine: Engine,
        configuration: Configuration,
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> Outcome:
        """Run one configuration, or what is left of it.

        Args:
            engine: The target with this configuration's draft.
            configuration: The cell.
            on_progress: Called with its turns done so far, shares of answers included.

        Returns:
            Its records and figures.
        """
        own = eval_engine(engine, batch=self._facts.batch)
        params = explicit_params(configuration.params, own)
        header = build_header(own, replace(self._facts, drafts=(configuration.draft,)))
        self._note_header(header, params)
        key = _key(header, params)
        found = self._found(key, configuration.prompts.questions)
        base = float(sum(len(q.turns) for q in configuration.prompts.questions if q in found))
        report = on_progress or _ignore
        report(base)
        runner = Runner(own, params, seed=self._facts.seed or 0, is_raw=self._is_raw)
        left = [q for q in configuration.prompts.questions if q not in found]
        for question in left[:1] * self._facts.warm_ups:
            runner.run([replace(question, turns=question.turns[:1])])

        def keep(question: Question, record: QuestionRecord) -> None:
            if self._log is not None and record.error is None:  # one that failed is tried again
                self._log.append(key, question, record, configuration=configuration.name)

        fresh = runner.run(left, on_done=keep, on_progress=lambda done: report(base + done))
        found.update(zip(left, fresh, strict=True))
        records = tuple(found[question] for question in configuration.prompts.questions)
        figures = self._figures(configuration, params, records, drafter=own.drafter.name)
        figures["resumed"] = len(records) - len(fresh)
        figures["draft"] = {**header["drafts"][0], "name": own.drafter.name}
        return Outcome(configuration=configuration, records=records, figures=figures)

    def results(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The result file of what has run."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "header": self.header,
            "configurations": [outcome.figures for outcome in outcomes],
        }

    # -- inside -------------------------------------------------------------------------------

    @property
    def _is_raw(self) -> bool:
        return self._facts.template == "raw"

    def _note_header(self, header: dict[str, Any], params: SamplingParams) -> None:
        """The first configuration's header, with the drafts and sampling of all that follow."""
        described = describe_params(params)
        if not self.header:
            self.header = {**header, "sampling": [described]}
            return
        for name, value in (("drafts", header["drafts"][0]), ("sampling", described)):
            if value not in self.header[name]:
                self.header[name].append(value)

    def _found(self, key: str, questions: Sequence[Question]) -> dict[Question, QuestionRecord]:
        if self._log is None:
            return {}
        pairs = ((question, self._log.find(key, question)) for question in questions)
        return {question: record for question, record in pairs if record is not None}

    def _figures(
        self,
        configuration: Configuration,
        params: SamplingParams,
        records: Sequence[QuestionRecord],
        *,
        drafter: str,
    ) -> dict[str, Any]:
        quality = confidence(all_rounds(records))
        law = {"rule": params.resolved_rule.value, "temperature": params.temperature}
        failed = [
            {"question_id": record.question_id, "error": record.error}
            for record in records
            if record.error is not None
        ]
        return {
            "name": configuration.name,
            "prompts": describe_prompts(configuration.prompts),
            "sampling": describe_params(params),
            "failed": failed,
            "acceptance": acceptance(records),
            "by_category": by_category(records),
            "by_context": by_context(records, self._edges),
            "confidence": None if quality is None else {**law, **quality},
            "definitions": {
                name: apply_definition(name, records, params) for name in self._definitions
            },
        }


def _ignore(done: float) -> None:
    """Report to nobody."""


def _key(header: dict[str, Any], params: SamplingParams) -> str:
    """Key of everything that decides a record but the question."""
    names = ("code", "libraries", "processor", "device", "threads", "target", "drafts")
    more = ("exact", "template", "think", "effort", "seed", "batch")
    settings = {name: header[name] for name in (*names, *more)}
    settings["exact"] = {**settings["exact"], "cost": None, "reason": None}  # these vary in time
    return settings_key({**settings, "sampling": describe_params(params)})
