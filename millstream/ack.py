"""Settlement: what becomes of a message, decided by one table.

The table maps (policy, outcome of the handler) to an action. The first settlement of a
message wins, whoever makes it: the handler by hand, an exception such as ``NackMessage``,
or the policy.
"""

from __future__ import annotations

import enum

import msgspec


class Settlement(enum.Enum):
    """The four things a broker can be told about a message."""

    #: Done; never deliver it again.
    ACK = "ack"
    #: Deliver it again, at once or after a delay.
    NACK = "nack"
    #: Never deliver it again, though it was not handled.
    REJECT = "reject"
    #: Nothing is said: the broker's own deadline decides.
    NONE = "none"
    # Under the names of other frameworks.
    ACKED, NACKED, REJECTED = ACK, NACK, REJECT


class AckPolicy(enum.Enum):
    """When a message counts as handled, and what an error does to it.

    Attributes:
        RETRY: the default where the source can redeliver: acknowledge after the handler
            and its confirmed publications; an error means a bounded, delayed retry and
            then the dead letter.
        ACK_FIRST: acknowledge before the handler runs (at most once).
        ACK: acknowledge afterwards, error or not.
        REJECT_ON_ERROR: an error discards the message.
        NACK_ON_ERROR: an error asks for a redelivery, without a limit but always after the
            retry's backoff.
        MANUAL: the handler settles by itself.
    """

    RETRY = "retry"
    ACK_FIRST = "ack_first"
    ACK = "ack"
    REJECT_ON_ERROR = "reject_on_error"
    NACK_ON_ERROR = "nack_on_error"
    MANUAL = "manual"


class Row(msgspec.Struct, frozen=True):
    """One row of the policy table; ``retry`` says that errors go through :class:`Retry`."""

    before: Settlement = Settlement.NONE
    success: Settlement = Settlement.ACK
    error: Settlement = Settlement.NACK
    decode_error: Settlement = Settlement.REJECT
    cancelled: Settlement = Settlement.NACK
    retry: bool = False


_S = Settlement
TABLE: dict[AckPolicy, Row] = {
    AckPolicy.RETRY: Row(retry=True),
    AckPolicy.ACK_FIRST: Row(_S.ACK, _S.NONE, _S.NONE, _S.NONE, _S.NONE),
    AckPolicy.ACK: Row(error=_S.ACK, decode_error=_S.ACK),
    AckPolicy.REJECT_ON_ERROR: Row(error=_S.REJECT),
    AckPolicy.NACK_ON_ERROR: Row(),
    AckPolicy.MANUAL: Row(_S.NONE, _S.NONE, _S.NONE, _S.REJECT, _S.NONE),
}
#: For sources that know no settlement at all (core NATS, plain pub/sub).
UNSETTLED = Row(_S.NONE, _S.NONE, _S.NONE, _S.NONE, _S.NONE)
