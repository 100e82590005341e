"""Runs of seeds, and the smallest plan that still fails."""

from __future__ import annotations

from dataclasses import dataclass

from tests.simulation.plan import Plan, make_plan
from tests.simulation.world import World


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    seed: int
    plan: Plan
    violations: list[str]
    trace: list[str]
    steps: int

    @property
    def kind(self) -> str:
        """What failed, without the particulars."""
        return self.violations[0].split()[0] if self.violations else ""

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {'; '.join(self.violations) or 'fine'}", str(self.plan)]
        return "\n".join([*lines, *self.trace])


def run(plan: Plan, seed: int) -> Outcome:
    """Run a plan with the scheduler's choices of a seed."""
    world = World(plan, seed)
    try:
        violations = world.run()
        return Outcome(seed, plan, violations, world.ledger.trace, world.loop.steps)
    finally:
        world.close()


def explore(seed: int) -> Outcome:
    """Run the plan of a seed."""
    return run(make_plan(seed), seed)


def shrink(outcome: Outcome, budget: int = 1500) -> Outcome:
    """Leave out what the failure does not need."""
    best = outcome
    found = True
    while found and budget > 0:
        found = False
        for plan in best.plan.simpler():
            for seed in range(best.seed, best.seed + 5):  # it may need another order
                budget -= 1
                again = run(plan, seed)
                if again.kind == best.kind:
                    break
            else:
                if budget <= 0:
                    break
                continue
            best, found = again, True
            break
    return best
