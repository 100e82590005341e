"""Hypothesis plays the operator: it publishes, kills, restarts, pauses, and shrinks what fails."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.simulation.plan import TROUBLES, Event, Item, Plan
from tests.simulation.world import World

PROCESSES = st.integers(0, 1)
FATES = st.lists(
    st.sampled_from(["raise", "nack", "slow", "stubborn", "hang", "abort"]), max_size=3
).map(tuple)
PLANS = st.builds(
    Plan,
    processes=st.just(2),
    concurrency=st.integers(1, 3),
    ordered=st.booleans(),
    attempts=st.integers(1, 4),
    where=st.sampled_from(["auto", "broker", "lane"]),
    dedup=st.sampled_from(["", "local", "shared"]),
    breaker=st.booleans(),
    timeout=st.just(2.0),
    graceful=st.sampled_from([0.5, 5.0]),
    publishes=st.booleans(),
    latency=st.sampled_from([0.0, 0.05]),
)


class Operator(RuleBasedStateMachine):
    """Two processes of one service, and everything that a user can do to them."""

    world: World | None = None
    sent = 0

    @initialize(plan=PLANS, seed=st.integers(0, 2**16))
    def begin(self, plan: Plan, seed: int) -> None:
        self.world = World(plan, seed)

    def apply(self, what: str, process: int = 0) -> None:
        assert self.world is not None
        self.world.happen(Event(0.0, what, process))

    @rule(key=st.integers(0, 2), fates=FATES, work=st.sampled_from([0.0, 0.3, 1.0]))
    def publish(self, key: int, fates: Any, work: float) -> None:
        assert self.world is not None
        self.sent += 1
        self.world.send(Item(self.sent, key, 0.0, work, fates))

    @rule(process=PROCESSES)
    def kill(self, process: int) -> None:
        self.apply("kill", process)

    @rule(process=PROCESSES)
    def start(self, process: int) -> None:
        self.apply("start", process)

    @rule(process=PROCESSES)
    def stop(self, process: int) -> None:
        self.apply("stop", process)

    @rule(process=PROCESSES)
    def hurry(self, process: int) -> None:
        self.apply("hurry", process)

    @rule(process=PROCESSES)
    def pause(self, process: int) -> None:
        self.apply("pause", process)

    @rule(process=PROCESSES)
    def resume(self, process: int) -> None:
        self.apply("resume", process)

    @rule(process=PROCESSES)
    def lose(self, process: int) -> None:
        self.apply("lost", process)

    @rule(what=st.sampled_from(TROUBLES))
    def break_(self, what: str) -> None:
        self.apply(f"break {what}")

    @precondition(lambda self: self.world is not None and self.world.broken)
    @rule(data=st.data())
    def heal(self, data: st.DataObject) -> None:
        assert self.world is not None
        self.apply(f"heal {data.draw(st.sampled_from(sorted(self.world.broken)))}")

    @rule(seconds=st.sampled_from([0.001, 0.1, 1.0, 5.0]))
    def advance(self, seconds: float) -> None:
        assert self.world is not None
        self.world.advance(seconds)

    @invariant()
    def nothing_is_wrong(self) -> None:
        if self.world is not None:
            assert not self.world.ledger.violations, "\n".join(self.world.ledger.trace)

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            violations = self.world.finish()
            assert not violations, "\n".join(self.world.ledger.trace)
        finally:
            self.world.close()


TestOperator = Operator.TestCase
TestOperator.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
