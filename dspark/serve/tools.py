"""`tools` and `tool_choice`: what the model is told, what it is held to, how its calls are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.serve.constraints import Constraint, call_constraint
from dspark.serve.failures import ApiError, bad_request
from dspark.serve.fields import ChatFields, ToolFields
from dspark.serve.layout import Layout
from dspark.serve.replies import Stage, WholeCall, read_json_calls

__all__ = ["ToolPlan", "plan_tools"]


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What becomes of a request's tools.

    Attributes:
        told: Tools that the model is told of.
        is_read: Its calls are looked for.
        constraint: What the answer is held to, if a call is wanted.
        name: The function that the request named.
        most_calls: Calls that are given out at the most.
    """

    told: Sequence[ToolFields] = ()
    is_read: bool = False
    constraint: Constraint | None = None
    name: str | None = None
    most_calls: int | None = None

    def stage(self, layout: Layout) -> Stage | None:
        """What reads the calls of an answer."""
        if self.constraint is not None:
            return WholeCall(self.name, read_json_calls)
        if not self.is_read:
            return None
        return layout.call_stage(frozenset(tool.function.name for tool in self.told))


def plan_tools(fields: ChatFields) -> ToolPlan:
    """Plan a request's tools.

    Raises:
        ApiError: With status 400, if tools and choice contradict each other.
    """
    tools, choice = fields.tools or [], fields.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice is for requests with tools.", "tool_choice")
        return ToolPlan()
    names = [tool.function.name for tool in tools]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise bad_request(f"tools: the function {double!r} is given twice.", "tools")
    most = 1 if fields.parallel_tool_calls is False else None
    if choice == "none":
        return ToolPlan()
    if choice in (None, "auto"):
        return ToolPlan(told=tools, is_read=True, most_calls=most)
    if _has_format(fields):
        raise bad_request(
            "a forced call and a response format exclude each other: ask for one of them.",
            "response_format",
        )
    name = _named(choice, names) if isinstance(choice, dict) else None
    return ToolPlan(
        told=tools,
        is_read=True,
        constraint=call_constraint(tools, name),
        name=name,
        most_calls=most,
    )


def _has_format(fields: ChatFields) -> bool:
    own = fields.response_format
    return fields.structured_outputs is not None or (own is not None and own.type != "text")


def _named(choice: dict[str, object], names: Sequence[str]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise _bad_choice("must be none, auto, required, or name a function")
    if name not in names:
        raise _bad_choice("names a function that is not among the tools")
    return name


def _bad_choice(what: str) -> ApiError:
    return bad_request(f"tool_choice {what}.", "tool_choice", "invalid_value")
