"""Does drafting pay? Costs of a round by its rows, and the per-request switches.

A drafted node pays while the tokens it is expected to add take less time that way than they would
by more rounds (`dspark.verify.scheduler`). The costs come from a measured profile or are learned
while the engine runs; nothing here changes the text under the greedy, coupled and sample-match
rules.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dspark.appetite import Appetite
from dspark.expert_reuse import ExpertReuse, PricesExperts
from dspark.seen_costs import MeasuredCosts, SeenCosts

__all__ = ["FirstNode", "PayoffSwitch", "RoundCosts", "StepClock", "StepSeconds"]

FloatArray = NDArray[np.float64]

StepSeconds: TypeAlias = Callable[[int, int], float]
"""Rows of a forward, committed tokens of a request -> seconds, > 0."""

_DECAY = 0.98
_OVERHEADS = 15  # drafted rounds whose median is the overhead
_LONG_SINCE_PLAIN = 100  # forwards with nodes
_PER_OCTAVE = 8  # contexts whose costs are told apart between n and 2 n tokens
_CURVES = 16  # contexts whose costs are kept


@dataclass(slots=True)
class StepClock:
    """Running estimate of a forward's seconds as base + slope * rows.

    A least-squares line whose older samples fade. Slow outliers (another program took the cores)
    are clipped to twice the estimate.
    """

    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _rows2: float = 0.0
    _cross: float = 0.0

    def record(self, rows: int, seconds: float) -> None:
        """Add a measured forward.

        Args:
            rows: Rows in the batch.
            seconds: Wall-clock seconds.
        """
        if self.is_known:
            seconds = min(seconds, 2 * self.seconds(rows))
        self._weight = self._weight * _DECAY + 1.0
        self._rows = self._rows * _DECAY + rows
        self._seconds = self._seconds * _DECAY + seconds
        self._rows2 = self._rows2 * _DECAY + rows * rows
        self._cross = self._cross * _DECAY + rows * seconds

    @property
    def is_known(self) -> bool:
        """True once forwards of different row counts were measured."""
        return self._weight > 3 and self._variance > 0.5

    def wants_plain(self, requests: int) -> bool:
        """True if only drafted rounds of one size were seen: a plain step would tell costs apart.

        Args:
            requests: Requests that decode, which is the rows of a plain step.
        """
        if self._weight <= 3 or self._variance > 0.5:
            return False
        return self._rows / self._weight > requests + 0.5

    @property
    def _variance(self) -> float:
        return self._rows2 / self._weight - (self._rows / self._weight) ** 2

    @property
    def slope(self) -> float:
        """Seconds a further row costs, never under 0; 0 until known."""
        if not self.is_known:
            return 0.0
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        covariance = self._cross / self._weight - mean_rows * mean_seconds
        return max(0.0, covariance / self._variance)

    def seconds(self, rows: float) -> float:
        """Estimated seconds of a forward of so many rows; 0 before any sample."""
        if self._weight == 0:
            return 0.0
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        return max(mean_seconds * 0.1, mean_seconds + self.slope * (rows - mean_rows))

    def line(self, first: int, count: int) -> FloatArray:
        """Estimated seconds of first, first + 1, ... rows, float64 [count]; see `seconds`."""
        if self._weight == 0:
            return np.zeros(count)
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        line = np.arange(first, first + count, dtype=np.float64)
        line -= mean_rows
        line *= self.slope
        line += mean_seconds
        return np.maximum(line, mean_seconds * 0.1, out=line)


class RoundCosts:
    """Seconds of a round: of its forward by rows, and of what comes on top.

    Args:
        step_seconds: What forwards cost; None learns a line while rounds run. A measured profile
            is corrected by what forwards are seen to take, and by the experts they are seen to
            wake where it prices them; any other function is looked up as it is.

    Attributes:
        clock: What is learned while rounds run.
        reuse: Experts that forwards woke against the profile's; None if it prices none.
    """

    def __init__(self, step_seconds: StepSeconds | None = None) -> None:
        self.clock = StepClock()
        self.reuse = ExpertReuse(step_seconds) if isinstance(step_seconds, PricesExperts) else None
        self._step_seconds = step_seconds
        self._curves: OrderedDict[int, FloatArray] = OrderedDict()  # seconds of 0, 1, ... rows
        is_measured = isinstance(step_seconds, MeasuredCosts) and step_seconds.is_measured
        self._seen = SeenCosts() if is_measured else None
        self._since_plain = 0  # forwards
        self._overheads: deque[float] = deque(maxlen=_OVERHEADS)
        self._plain_overheads: deque[float] = deque(maxlen=_OVERHEADS)
        self._askings: deque[float] = deque(maxlen=_OVERHEADS)

    @property
    def is_profiled(self) -> bool:
        """True if forwards are looked up in a profile."""
        return self._step_seconds is not None

    @property
    def is_known(self) -> bool:
        """True once it can be said what further rows cost."""
        return self.is_profiled or self.clock.is_known

    @property
    def overhead(self) -> float:
        """Seconds of a drafted round outside the forward: the median of the last; 0 before any."""
        return statistics.median(self._overheads) if self._overheads else 0.0

    @property
    def asking(self) -> float:
        """Seconds that drafting for one request adds to a round, its nodes' rows aside.

        The median of the last drafted rounds; 0 before any.
        """
        return statistics.median(self._askings) if self._askings else 0.0

    def wants_plain(self, requests: int) -> bool:
        """Whether a plain step would tell what a step takes anyhow from what its rows cost.

        As `StepClock.wants_plain`, and under a measured profile where none was seen for long; a
        function that is taken at its word needs none.

        Args:
            requests: Requests that decode, which is the rows of a plain step.
        """
        if self._seen is not None:
            return self._since_plain >= _LONG_SINCE_PLAIN
        return not self.is_profiled and self.clock.wants_plain(requests)

    def record(
        self,
        rows: int,
        seconds: float,
        woken: float | None = None,
        *,
        requests: int = 1,
        context: int = 0,
    ) -> None:
        """Add a measured forward without prompt rows.

        Args:
            rows: Rows in the batch.
            seconds: Wall-clock seconds.
            woken: Distinct experts of a layer that it woke, the mean over layers, if that is known.
            requests: Requests in the batch.
            context: As for `forwards`.
        """
        self.clock.record(rows, seconds)
        if self.reuse is not None and woken is not None:
            self.reuse.record(rows, woken)
        if self._seen is not None:
            self._since_plain = 0 if rows == requests else self._since_plain + 1
            profiled = self._once(rows, context)
            self._seen.record(requests, self._alone(context), profiled, seconds)

    def record_overhead(self, draft: float, rest: float, drafted: int) -> None:
        """Add what a round took besides its forward.

        Args:
            draft: Seconds of drafting.
            rest: Seconds of all else.
            drafted: Requests that were drafted for.
        """
        if not drafted:
            self._plain_overheads.append(rest)
            return
        self._overheads.append(draft + rest)
        plain = statistics.median(self._plain_overheads) if self._plain_overheads else rest
        self._askings.append((draft + max(0.0, rest - plain)) / drafted)

    def forwards(self, first: int, count: int, context: int) -> FloatArray:
        """Seconds of forwards of first, first + 1, ... rows.

        Args:
            first: Fewest rows, >= 1.
            count: How many row counts, >= 1.
            context: Committed tokens of a request, on average; what a profile was measured for
                within 5 % counts as the same.

        Returns:
            float64 [count]; meaningful once `is_known`.
        """
        if self._step_seconds is None:
            return self.clock.line(first, count)
        octave = _octave(context)
        curve = self._curves.get(octave)
        if curve is None:
            curve = np.full(1, np.nan)
        if len(curve) < first + count:
            more = np.full(max(first + count - len(curve), len(curve)), np.nan)
            curve = np.append(curve, more)
        self._curves[octave] = curve
        self._curves.move_to_end(octave)
        if len(self._curves) > _CURVES:
            self._curves.popitem(last=False)
        wanted = curve[first : first + count]
        if math.isnan(wanted.min()):
            typical = round(2 ** (octave / _PER_OCTAVE))
            for i in np.flatnonzero(np.isnan(wanted)).tolist():
                wanted[i] = self._step_seconds(first + i, typical)
        return wanted.copy()

    def seen(self, first: int, count: int, context: int, requests: int) -> FloatArray:
        """As `forwards`, corrected by what forwards of the engine took and which experts they woke.

        Args:
            first: Fewest rows, >= 1.
            count: How many row counts, >= 1.
            context: As for `forwards`.
            requests: Requests of such a forward, >= 1.
        """
        seconds = self._with_experts(first, count, context)
        if self._seen is None:
            return seconds
        return self._seen.seconds(requests, self._alone(context), seconds)

    def seen_once(self, rows: int, context: int, requests: int) -> float:
        """As `seen`, for one number of rows."""
        profiled = self._once(rows, context)
        if self._seen is None:
            return profiled
        return self._seen.once(requests, self._alone(context), profiled)

    def rates(
        self,
        rows: int,
        context: int,
        *,
        with_overhead: bool,
        requests: int = 1,
        prompt_rows: int = 0,
    ) -> Callable[[int], FloatArray] | None:
        """Rounds per second, for `dspark.verify.scheduler.Load`.

        The time of prompt rows is left out. They have to be run once, whatever is admitted beside
        them: a round that they make long makes no token worth more, while nodes cost what they do
        on top of so many rows.

        Args:
            rows: Rows that a round has without drafted nodes and prompt rows.
            context: As for `forwards`.
            with_overhead: Count what is measured as rounds run: what a round takes besides its
                forward, what forwards take, and how many experts their rows wake.
            requests: Requests that decode.
            prompt_rows: Rows of prompts that ride along.

        Returns:
            Nodes n -> float64 [n + 1], with 0, 1, ... n nodes; None while costs are not known.
        """
        if not self.is_known:
            return None
        seconds = partial(self.seen, requests=requests) if with_overhead else self.forwards
        extra = self.overhead if with_overhead else 0.0
        if not prompt_rows:
            return _Rates(lambda nodes: 1.0 / (seconds(rows, nodes + 1, context) + extra))
        first = rows + prompt_rows
        alone, whole = (float(seconds(count, 1, context)[0]) for count in (rows, first))

        def beside_prompts(nodes: int) -> FloatArray:
            further = seconds(first, nodes + 1, context) - whole
            return 1.0 / (np.maximum(alone + further, min(alone, whole)) + extra)

        return _Rates(beside_prompts)

    def _alone(self, context: int) -> float:
        """Seconds that the profile has for one row."""
        return self._profiled(1, context)

    def _profiled(self, rows: int, context: int) -> float:
        """As `forwards`, for one number of rows."""
        curve = self._curves.get(_octave(context))
        seconds = math.nan if curve is None or rows >= len(curve) else float(curve[rows])
        return float(self.forwards(rows, 1, context)[0]) if math.isnan(seconds) else seconds

    def _once(self, rows: int, context: int) -> float:
        """As `_with_experts`, for one number of rows."""
        if self.reuse is None:
            return self._profiled(rows, context)
        return float(self._with_experts(rows, 1, context)[0])

    def _with_experts(self, first: int, count: int, context: int) -> FloatArray:
        """As `forwards`, with as many experts as forwards were seen to wake."""
        seconds = self.forwards(first, count, context)
        if self.reuse is None:
            return seconds
        # However much rows share, a step of many takes no less than one of a single row.
        least = np.minimum(seconds, self._alone(context))
        return np.maximum(seconds + self.reuse.seconds(first, count), least)


def _octave(context: int) -> int:
    """Contexts of the same number have the same costs."""
    return round(_PER_OCTAVE * math.log2(max(context, 1)))


class _Rates:
    """Rates of a round, computed once for the most nodes that were asked for."""

    __slots__ = ("_compute", "_known")

    def __init__(self, compute: Callable[[int], FloatArray]) -> None:
        self._compute = compute
        self._known: FloatArray = np.empty(0)

    def __call__(self, nodes: int) -> FloatArray:
        if len(self._known) <= nodes:
            self._known = self._compute(nodes)
        return self._known[: nodes + 1]


@dataclass(slots=True)
class FirstNode:
    """Tells whether a request's next proposal can be expected to be worth asking for.

    It cannot if none of the last proposals had a first node that pays, or if what they gained on
    average is less than what drafting them took. Then nothing is drafted, but for a probe after
    8 rounds, 16, and so on up to 64, as long as that stays so.
    """

    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=4))
    _gains: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    _wait: int = 0
    _pause: int = 8

    _LONGEST_PAUSE = 64

    def offered(self, survival: float, gain: float = math.inf) -> None:
        """Note a proposal that was not empty.

        Args:
            survival: Of its best node.
            gain: Tokens that its verified nodes are expected to add beyond what their rows cost.
        """
        self._recent.append(survival)
        self._gains.append(gain)

    def pays(self, bar: float, price: float = 0.0) -> bool:
        """Decide about the next round, and count it if it is to be skipped.

        Args:
            bar: Survival that the best node must exceed.
            price: Tokens that plain decoding makes in the time that drafting takes.
        """
        few = len(self._recent) < 4
        if few or (max(self._recent) > bar and sum(self._gains) >= price * len(self._gains)):
            self._wait, self._pause = 0, 8
            return True
        if self._wait == 0:
            self._wait = self._pause
            self._pause = min(2 * self._pause, self._LONGEST_PAUSE)
            return False
        self._wait -= 1
        return self._wait == 0


@dataclass(slots=True)
class PayoffSwitch:
    """Switches drafting off for a request while it loses, and probes again.

    Over the last rounds with a non-empty proposal, drafting gains when
    mean committed tokens > 1 + extra seconds / seconds of the request's share of a plain step.
    Few rounds say little where some commit one token and others five, so it is switched off only
    if it loses by more than the standard error of that mean.

    Attributes:
        allowed: False to never switch off.
        off_count: Times it switched off.
        first_node: What the request's last proposals were worth.
        appetite: How many of their nodes were verified.
    """

    allowed: bool = True
    off_count: int = 0
    first_node: FirstNode = field(default_factory=FirstNode)
    appetite: Appetite = field(default_factory=Appetite)
    _tokens: float = 0.0
    _squares: float = 0.0
    _ratio: float = 0.0
    _rounds: float = 0.0
    _weights2: float = 0.0
    _pause: int = 0
    _next_pause: int = 16
    _since_probe: int = field(default=0)

    _FADE = 0.95
    _LEAST_ROUNDS = 6
    _LONGEST_PAUSE = 256

    @property
    def is_on(self) -> bool:
        """True if the request should be drafted for in this round."""
        return not self.allowed or self._pause == 0

    def skipped(self) -> None:
        """Count a round without drafting."""
        if self._pause > 0:
            self._pause -= 1

    def drafted(self, committed: int, extra: float, plain: float) -> None:
        """Count a round with drafting.

        Args:
            committed: Tokens the round committed.
            extra: Seconds that drafting and verifying its nodes added.
            plain: Seconds of the request's share of a plain step.
        """
        if plain <= 0:
            return
        fade = self._FADE
        self._tokens = self._tokens * fade + committed
        self._squares = self._squares * fade + committed * committed
        self._ratio = self._ratio * fade + 1 + extra / plain
        self._rounds = self._rounds * fade + 1
        self._weights2 = self._weights2 * fade * fade + 1
        self._since_probe += 1
        if self._since_probe < self._LEAST_ROUNDS:
            return
        lead = (self._tokens - self._ratio) / self._rounds
        if lead >= 0:
            self._next_pause = 16
        if lead >= -self._standard_error():
            return
        if self.allowed:
            self.off_count += 1
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, self._LONGEST_PAUSE)
            self._tokens = self._squares = self._ratio = 0.0
            self._rounds = self._weights2 = 0.0
            self._since_probe = 0

    def _standard_error(self) -> float:
        """Of the mean committed tokens, with rounds weighted as they fade.

        A round more, a token off the mean, keeps rounds that were all alike from being certain.
        """
        mean = self._tokens / self._rounds
        squares = max(0.0, self._squares - self._rounds * mean * mean) + 1.0
        return math.sqrt(squares / (self._rounds + 1) * self._weights2) / self._rounds
