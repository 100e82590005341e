"""Plans that once found something, with the seed of the scheduler, as small as they would get.

Unlike a seed alone, a plan stays what it is when the generator of plans changes.
"""

from __future__ import annotations

from tests.simulation.plan import Event, Item, Plan

FINDINGS: dict[str, tuple[Plan, int]] = {
    "a resume that fails is tried again": (
        Plan(
            events=(
                Event(1.495, "pause", steps=13),
                Event(4.011, "break subscribe"),
                Event(4.901, "resume", steps=4),
                Event(6.0, "heal subscribe"),
            ),
            concurrency=2,
        ),
        0,
    ),
    "what runs can be settled though subscribing anew failed": (
        Plan(
            items=(Item(4, 2, 0.0, fates=("slow",)),),
            events=(
                Event(0.874, "pause", steps=38),
                Event(4.989, "break subscribe", steps=32),
                Event(6.036, "resume", steps=19),
                Event(10.472, "heal subscribe"),
            ),
            concurrency=4,
            attempts=3,
            graceful=5.0,
        ),
        80,
    ),
    "a resume during a pause does not lose the new intake": (
        Plan(
            items=(Item(1, 1, 1.133, work=1.0, fates=("nack",)),),
            events=(Event(1.424, "pause", steps=11), Event(1.435, "resume")),
            concurrency=4,
            base=0.1,
            where="broker",
            fifo=0.9,
        ),
        521,
    ),
    "a pause by hand outlasts the breaker's": (
        Plan(
            items=(
                *(Item(n, 0, 0.1 * n, fates=("never",)) for n in range(1, 5)),
                Item(5, 0, 6.0),
            ),
            events=(Event(0.5, "pause"), Event(8.0, "resume")),
            attempts=1,
            breaker=True,
        ),
        1,
    ),
    "a pause counts though the subscription is only starting": (
        Plan(
            items=(Item(1, 0, 2.0),),
            events=(Event(0.02, "pause"), Event(4.0, "resume")),
            latency=0.05,
        ),
        1,
    ),
    "a pause counts while a lost subscription comes back": (
        Plan(
            items=(Item(1, 0, 5.0),),
            events=(
                Event(1.0, "break subscribe"),
                Event(1.1, "lost"),
                Event(1.5, "pause"),
                Event(2.0, "heal subscribe"),
                Event(8.0, "resume"),
            ),
        ),
        1,
    ),
    "a pause that a stop overtakes does not fail": (
        Plan(
            items=(Item(1, 1, 4.486, fates=("never",)),),
            events=(Event(6.096, "pause", steps=30),),
            ordered=True,
            attempts=3,
            base=1.0,
            where="lane",
            breaker=True,
        ),
        1284,
    ),
    "a subscription lost before the driver returned it comes back": (
        Plan(
            events=(Event(3.837, "lost", steps=4), Event(4.176, "lost", steps=28)),
            concurrency=2,
            breaker=True,
            latency=0.05,
            fifo=0.5,
        ),
        1997,
    ),
    "a stop during the start leaves nothing": (
        Plan(events=(Event(0.093, "stop", steps=39),), graceful=0.5, latency=0.05),
        1076,
    ),
    "a handler deaf to cancellation does not hold up the stop": (
        Plan(items=(Item(3, 2, 0.372, fates=("deaf",)),), events=(Event(2.0, "stop"),)),
        69,
    ),
    "a timer that is early by a rounding error ends the drain all the same": (
        Plan(
            items=(Item(1, 0, 0.0, fates=("slow",)), *(Item(n, 0, 0.0) for n in (2, 3, 4))),
            events=(Event(0.8288, "stop"),),
            ordered=True,
            graceful=5.0,
            latency=0.05,
        ),
        1,
    ),
    "a third signal during a stop is no error": (
        Plan(
            items=tuple(Item(n, 0, 0.0, work=1.0) for n in range(1, 5)),
            events=(Event(0.5, "stop"), Event(0.51, "hurry"), Event(0.51, "hurry", steps=1)),
            ordered=True,
            latency=0.05,
        ),
        4,
    ),
    "deadlines of what waits for room in the lanes are kept": (
        Plan(
            items=(
                Item(5, 0, 2.092, work=1.0, fates=("never",)),
                Item(9, 0, 2.32),
                Item(11, 2, 3.65),
                Item(12, 1, 4.643),
            ),
            ordered=True,
            base=0.1,
            timeout=2.0,
            graceful=5.0,
            fifo=0.9,
        ),
        129,
    ),
    "a redelivery asked for by the handler waits for its backoff, retried in place or not": (
        Plan(
            items=(Item(3, 2, 0.0, fates=("hang", "nack", "slow")),),
            concurrency=4,
            base=0.1,
            where="lane",
            timeout=2.0,
            graceful=0.5,
            fifo=0.9,
        ),
        15,
    ),
    "the good part of a batch is not handled again in place": (
        Plan(
            items=(Item(8, 2, 0.0), Item(12, 2, 0.0, fates=("raise",))),
            batch=2,
            attempts=3,
            base=0.1,
            where="lane",
            graceful=0.5,
            fifo=0.5,
        ),
        74,
    ),
    "one message of a batch that cannot be settled does not keep the others": (
        Plan(
            items=(
                Item(3, 1, 0.0, work=1.0),
                Item(8, 1, 0.0, work=1.0, fates=("nack",)),
            ),
            events=(
                Event(1.954, "break settle", steps=36),
                Event(5.553, "heal settle"),
            ),
            batch=2,
            attempts=3,
            graceful=5.0,
            latency=0.05,
        ),
        1807,
    ),
    "a hand-back that fails does not end the pause half-way": (
        Plan(
            items=(Item(5, 0, 0.0, fates=("slow", "nack")), Item(7, 0, 0.0, fates=("raise",))),
            events=(
                Event(0.883, "break settle", steps=22),
                Event(1.293, "pause", steps=10),
                Event(3.0, "heal settle"),
            ),
            concurrency=4,
            ordered=True,
            timeout=2.0,
            graceful=0.5,
            fifo=0.9,
        ),
        310,
    ),
    "a message acknowledged late does not stall the store": (
        Plan(
            items=(
                Item(4, 1, 0.12, work=1.0),
                Item(5, 1, 0.176),
                Item(6, 1, 0.26),
                Item(7, 1, 0.198, work=1.0),
                Item(11, 0, 0.466),
                Item(12, 2, 0.371),
            ),
            events=(Event(0.481, "break mute", steps=22), Event(4.892, "heal mute")),
            ordered=True,
            attempts=3,
            where="lane",
            timeout=2.0,
            fifo=0.5,
        ),
        9769,
    ),
    "what waited in a lane past its deadline is not begun there": (
        Plan(
            items=(
                Item(1, 2, 0.372),
                Item(2, 1, 0.506, fates=("slow", "stubborn")),
                Item(7, 2, 0.474),
                Item(8, 2, 0.359),
                Item(10, 2, 0.394),
                Item(11, 1, 0.398, work=1.0, fates=("raise",)),
                Item(12, 2, 0.199, work=1.0),
            ),
            events=(Event(2.462, "break mute", steps=22), Event(7.823, "heal mute")),
            processes=2,
            ordered=True,
            attempts=2,
            base=0.1,
            where="lane",
            timeout=2.0,
            graceful=5.0,
            fifo=0.9,
        ),
        702450,
    ),
    "nor is the last attempt, where another process had begun it": (
        Plan(
            items=(
                Item(5, 2, 0.0, fates=("hang", "hang", "stubborn", "nack")),
                Item(7, 1, 0.0, fates=("raise",)),
            ),
            events=(
                Event(3.279, "break mute", process=1, steps=39),
                Event(3.303, "start", process=1),
                Event(7.406, "heal mute"),
            ),
            ordered=True,
            attempts=2,
            base=0.1,
            where="broker",
            timeout=2.0,
            graceful=5.0,
            fifo=0.9,
        ),
        803323,
    ),
    "attempts in place end where the message became another process's": (
        Plan(
            items=(Item(4, 2, 0.0, fates=("never",)),),
            events=(
                Event(3.78, "break touch", process=2, steps=12),
                Event(9.258, "heal touch"),
            ),
            processes=3,
            ordered=True,
            timeout=2.0,
            graceful=0.5,
        ),
        815575,
    ),
    "a stop that overtakes the start keeps up the deadlines of what runs": (
        Plan(
            items=(Item(5, 1, 0.0, fates=("slow", "hang")),),
            events=(Event(0.052, "stop", steps=22),),
            concurrency=4,
            attempts=3,
            base=0.1,
            where="lane",
            timeout=2.0,
            graceful=5.0,
            latency=0.05,
        ),
        1131940,
    ),
}
