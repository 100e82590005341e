"""Each verdict fires on a history made to deserve it, and only there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.checker import Fault, check
from tests.faults.ledger import Ledger, Record, read


def history(*lines: str) -> list[Record]:
    """Records from lines ``at pid event id [name=value ...]``."""
    records = []
    for line in lines:
        at, pid, event, id, *rest = line.split()
        more: dict[str, object] = dict(pair.split("=") for pair in rest)
        more |= {name: int(str(more[name])) for name in ("seq", "pid") if name in more}
        records.append(Record(float(at), int(pid), event, "" if id == "-" else id, more))
    return records


def handled(id: str, at: float, *, run: str = "", pid: int = 1, key: str = "k") -> list[str]:
    """A message's whole good way through process ``pid``."""
    run = run or id
    return [
        f"{at} {pid} start {id} run={run} key={key}",
        f"{at + 0.1} {pid} effect {id} run={run}",
        f"{at + 0.1} {pid} end {id} run={run} how=ok",
        f"{at + 0.2} {pid} settled {id} how=ACK",
    ]


def sent(id: str, at: float = 0.0, *, key: str = "k", seq: int = 0) -> list[str]:
    return [f"{at} 9 sent {id} key={key} seq={seq}", f"{at} 9 confirmed {id}"]


def test_a_good_history_has_no_fault_in_it() -> None:
    found = check(
        history(*sent("a", seq=1), *sent("b", seq=2), *handled("a", 1), *handled("b", 2)),
        ordered=True,
    )
    assert found.sent == 2
    assert not (found.lost or found.phantom or found.duplicates or found.uncaused)
    assert not (found.reordered or found.overlaps or found.unsettled or found.unbegun)


def test_lost() -> None:
    records = history(*sent("a"), *sent("b"), "0 9 sent c key=k", *handled("a", 1))
    assert check(records).lost == {"b"}  # c was never confirmed
    assert check(records, confirms=False).lost == {"b", "c"}


def test_a_dead_letter_is_no_loss_if_it_was_begun() -> None:
    begun = history(*sent("a"), "1 1 start a run=x", "1 1 end a run=x how=error", "2 9 dead a")
    assert check(begun).lost == check(begun).unbegun == set()
    assert check(history(*sent("a"), "2 9 dead a")).unbegun == {"a"}


def test_a_dead_letter_of_what_had_its_effect() -> None:
    records = history(*sent("a"), *sent("b"), *handled("a", 1), "2 9 dead a", "2 9 dead b")
    assert check(records).misburied == {"a"}


def test_a_loss_that_no_fault_accounts_for() -> None:
    records = history(*sent("a", 1), *sent("b", 4.5), *sent("c", 9))
    found = check(records, [Fault("cut", 2, 4)])
    assert found.lost == found.abandoned == {"a", "b", "c"}
    assert check(records, [Fault("cut", 2, 4)], away=(1.5, 1)).abandoned == {"c"}


def test_phantom() -> None:
    assert check(history(*handled("a", 1))).phantom == {"a"}
    assert check(history("1 9 dead a")).phantom == {"a"}


TWICE = [*sent("a"), *handled("a", 1, run="x"), *handled("a", 4, run="y", pid=2)]


def test_duplicate_and_its_cause() -> None:
    found = check(history(*TWICE))
    assert found.duplicated == 1 and found.uncaused == {"a"}
    # A fault in between accounts for it; one before, after, or of another process does not.
    assert not check(history(*TWICE), [Fault("cut", 1.15, 2)]).uncaused
    assert not check(history(*TWICE), [Fault("cut", 1.15, 2, frozenset([1]))]).uncaused
    assert check(history(*TWICE), [Fault("cut", 0.1, 0.5)]).uncaused == {"a"}
    assert not check(history(*TWICE), [Fault("cut", 0.1, 0.5)], linger=0.6).uncaused
    assert check(history(*TWICE), [Fault("cut", 5, 6)]).uncaused == {"a"}
    assert check(history(*TWICE), [Fault("cut", 1.15, 2, frozenset([3]))]).uncaused == {"a"}


def test_a_process_that_dies_while_it_publishes_a_message_anew_leaves_it_there_twice() -> None:
    killed = Fault("killed", 0.6, 0.7, frozenset([3]))
    assert check(history(*TWICE), [killed]).uncaused == {"a"}
    assert not check(history(*TWICE, "0.5 3 moves a"), [killed]).uncaused
    assert not check(history(*TWICE, "0.5 3 moves a"), [Fault("cut", 0.6, 0.7)]).uncaused
    # What was acknowledged long before, another process did, or another message, is no cause.
    over = history(*TWICE, "0.3 3 moves a", "0.4 3 moved a")
    assert check(over, [killed]).uncaused == {"a"}
    for other in ("0.5 4 moves a", "0.5 3 moves b"):
        records = history(*TWICE, *sent("b"), *handled("b", 1), other)
        assert check(records, [killed]).uncaused == {"a"}


def test_a_failure_or_a_second_sending_is_a_cause() -> None:
    failed = [line.replace("how=ok", "how=error") for line in TWICE]
    assert not check(history(*failed)).uncaused
    again = history(*TWICE, "0.5 9 sent a key=k seq=0")
    assert not check(again).uncaused
    assert check(again, repeats=False).uncaused == {"a"}


def test_a_client_may_send_again_what_a_fault_interrupted() -> None:
    twice = history(
        "1 9 sent a key=k", "3 9 confirmed a", *handled("a", 4, run="x"), *handled("a", 5, run="y")
    )
    during, after = Fault("restarted", 2, 2.5), Fault("restarted", 3.1, 3.5)
    assert check(twice, [during]).uncaused == {"a"}
    assert not check(twice, [during], resends=True).uncaused
    assert check(twice, [after], resends=True).uncaused == {"a"}


def test_reorder_per_key() -> None:
    lines = [*sent("a", seq=1), *sent("b", seq=2), *handled("b", 1), *handled("a", 2)]
    assert check(history(*lines), ordered=True).reordered == {"k"}
    assert not check(history(*lines)).reordered
    apart = [line.replace("key=k seq=2", "key=other seq=2") for line in lines]
    assert not check(history(*apart), ordered=True).reordered


def test_overlap_of_a_message_and_of_a_key() -> None:
    same = history(*sent("a"), *handled("a", 1, run="x"), *handled("a", 1.05, run="y", pid=2))
    assert check(same).overlaps == {"a"}
    keys = history(*sent("a"), *sent("b"), *handled("a", 1), *handled("b", 1.05))
    assert check(keys).overlaps == set()
    assert check(keys, ordered=True).overlaps == {"k"}


def test_an_attempt_ends_with_its_process() -> None:
    killed = ["1 1 start a run=x key=k", "3 9 died - pid=1", *handled("a", 4, run="y", pid=2)]
    assert not check(history(*sent("a"), *killed)).overlaps
    early = [*killed[:2], *handled("a", 2, run="y", pid=2)]
    records = sorted(history(*sent("a"), *early), key=lambda r: r.at)
    assert check(records).overlaps == {"a"}


def test_unsettled() -> None:
    records = history(*sent("a"), *handled("a", 1)[:-1])
    assert check(records).unsettled == 1
    assert check(records, held=0).unsettled == 0  # the broker knows better
    assert check(history(*sent("a"), *handled("a", 1)), held=3).unsettled == 3
    nacked = history(*sent("a"), *handled("a", 1)[:-1], "2 1 settled a how=NACK")
    assert check(nacked).unsettled == 1


def test_stall_counts_only_while_there_is_work_and_no_fault() -> None:
    lines = [*sent("a"), *sent("b"), *handled("a", 1), *handled("b", 7)]
    assert check(history(*lines)).stall == pytest.approx(6.0)
    assert check(history(*lines), [Fault("cut", 2, 6)]).stall == pytest.approx(2.0)
    later = history(*sent("a"), *handled("a", 1), *sent("b", 6.9), *handled("b", 7))
    assert check(later).stall == pytest.approx(1.1)
    # What was stored though its sender gave up is work, too.
    late = ["1 9 sent c key=k", *handled("c", 4)]
    assert check(history(*lines, *late)).stall == pytest.approx(3.0)


def test_recovery_and_what_was_in_flight() -> None:
    lines = [
        *sent("a"),
        *sent("b", 3.5),
        "1 1 start a run=x key=k",
        "2 9 died - pid=1",
        *handled("b", 4, pid=2),
        *handled("a", 6, run="y", pid=2),
    ]
    found = check(history(*lines), [Fault("killed", 2, 2, frozenset([1]))])
    assert found.in_flight == [1]
    assert found.recovery == [pytest.approx(4.1)]
    # What was published anew since then waits behind the others, for as long as these take.
    moved = history(*lines, "2.5 2 moves a", "2.6 2 moved a")
    assert check(moved, [Fault("killed", 2, 2, frozenset([1]))]).recovery == [pytest.approx(2.1)]


def test_a_ledger_survives_a_kill_and_half_a_line(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from tests.faults.ledger import Ledger\n"
        f"ledger = Ledger(Path({str(tmp_path)!r}), 'a')\n"
        "for n in range(3): ledger.write('effect', str(n), run='x')\n"
        "os.write(ledger._file, b'[1.0, 2, ')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", program], env=env, check=False)
    assert ended.returncode == -signal.SIGKILL
    own = Ledger(tmp_path, "b")
    own.write("sent", "0")
    own.close()
    records = read(tmp_path)
    assert [(r.event, r.id) for r in records] == [
        *(("effect", str(n)) for n in range(3)),
        ("sent", "0"),
    ]
    assert records == sorted(records, key=lambda r: r.at)
