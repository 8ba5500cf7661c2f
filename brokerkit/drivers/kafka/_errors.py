"""From what brokers answer and connections suffer to the errors of brokerkit, with texts that say what to do."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from kio.schema.errors import ErrorCode as Code

from ...errors import (
    AuthenticationError,
    AuthorizationError,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
    DeliveryLost,
    InvalidName,
    NotAttempted,
    NotFound,
    PositionLost,
    PublishUnknown,
    TooLarge,
)


class Unanswered(BrokerUnavailable):
    """A request was sent and never answered: unlike what its base says, it may have been carried out."""


class Refused(Exception):
    """What a broker answered: the cause of the error that the program sees."""

    def __init__(self, code: int, said: str = "") -> None:
        self.code = code
        self.name = _name(code)
        super().__init__(f"{self.name} ({code})" + (f": {said}" if said else ""))


DENIED: Final = frozenset({
    Code.topic_authorization_failed, Code.group_authorization_failed, Code.cluster_authorization_failed,
    Code.transactional_id_authorization_failed, Code.delegation_token_authorization_failed,
})  # fmt: skip
"""The user lacks a right."""
STALE_LEADER: Final = frozenset({
    Code.unknown_topic_or_partition, Code.leader_not_available, Code.not_leader_or_follower, Code.replica_not_available,
    Code.kafka_storage_error, Code.listener_not_found, Code.fenced_leader_epoch, Code.unknown_leader_epoch,
    Code.unknown_topic_id, Code.inconsistent_topic_id, Code.new_leader_elected,
})  # fmt: skip
"""The partition is not where it was thought to be, or not at all: look at the cluster again."""
STALE_COORDINATOR: Final = frozenset({Code.coordinator_not_available, Code.not_coordinator})
"""The group is not where it was thought to be: ask again which broker coordinates it."""
RETRY: Final = frozenset({code for code in Code if code.retriable} | {Code.broker_not_available})
"""The same request may succeed a moment later; where the set above has them too, at another broker."""
LOST_MEMBER: Final = frozenset({
    Code.illegal_generation, Code.unknown_member_id, Code.fenced_member_epoch, Code.stale_member_epoch,
})  # fmt: skip
"""The group goes on without this member: what it had in hand belongs to others."""
LOST_SESSION: Final = frozenset({
    Code.out_of_order_sequence_number, Code.invalid_producer_epoch, Code.invalid_producer_id_mapping,
    Code.unknown_producer_id, Code.producer_fenced,
})  # fmt: skip
"""The broker does not know this producer or its numbers any more: begin with new ones."""

RIGHTS: Final = "README, section Kafka, has the rights that brokerkit needs"
_TOLD: Final[Mapping[Code, tuple[Callable[[str], BrokerError], str]]] = {
    Code.unknown_server_error: (BrokerError, "the broker failed; its log says why"),
    Code.offset_out_of_range: (PositionLost, "the position is not in the log any more"),
    Code.corrupt_message: (BrokerUnavailable, "a record was damaged on its way"),
    Code.unknown_topic_or_partition: (NotFound, "there is no such topic or partition"),
    Code.leader_not_available: (BrokerUnavailable, "the partition has no leader at the moment"),
    Code.not_leader_or_follower: (BrokerUnavailable, "the partition has moved to another broker"),
    Code.request_timed_out: (Unanswered, "the brokers did not finish it in time"),
    Code.broker_not_available: (BrokerUnavailable, "the broker is not available"),
    Code.replica_not_available: (BrokerUnavailable, "the broker has no copy of the partition at the moment"),
    Code.message_too_large: (TooLarge, "a record is larger than the topic takes; raise its max.message.bytes"),
    Code.offset_metadata_too_large: (
        BrokerError,
        "the broker stores too little with an offset; raise its offset.metadata.max.bytes to 4096, as it was",
    ),
    Code.network_exception: (BrokerUnavailable, "the brokers lost the connection between them"),
    Code.coordinator_load_in_progress: (BrokerUnavailable, "the group's coordinator is loading what it knows"),
    Code.coordinator_not_available: (BrokerUnavailable, "the group has no coordinator at the moment"),
    Code.not_coordinator: (BrokerUnavailable, "the group's coordinator is another broker by now"),
    Code.invalid_topic_exception: (InvalidName, "Kafka does not take this name for a topic"),
    Code.record_list_too_large: (TooLarge, "the records are larger than the topic's segment.bytes"),
    Code.not_enough_replicas: (
        BrokerUnavailable,
        "fewer copies of the partition are in sync than its min.insync.replicas asks for",
    ),
    Code.not_enough_replicas_after_append: (
        PublishUnknown,
        "stored, but on fewer copies than the topic's min.insync.replicas asks for",
    ),
    Code.illegal_generation: (DeliveryLost, "the group has shared out its partitions anew"),
    Code.inconsistent_group_protocol: (
        ConfigError,
        "another kind of client uses this group; take another group, or another prefix",
    ),
    Code.invalid_group_id: (InvalidName, "Kafka does not take this name for a group"),
    Code.unknown_member_id: (DeliveryLost, "the group goes on without this member"),
    Code.invalid_session_timeout: (
        ConfigError,
        "the broker takes no such session=; its group.min.session.timeout.ms to group.max.session.timeout.ms, 6 s to 30 min",
    ),
    Code.rebalance_in_progress: (BrokerUnavailable, "the group is sharing out its partitions"),
    Code.invalid_timestamp: (
        ConfigError,
        "the time of a record is further from the broker's clock than the topic's message.timestamp.*.max.ms allow",
    ),
    Code.unsupported_sasl_mechanism: (AuthenticationError, "the broker does not offer this way to log in"),
    Code.illegal_sasl_state: (ConfigError, "this port wants no user name and password; leave them out"),
    Code.unsupported_version: (
        ConfigError,
        "the broker does not speak this version; brokerkit needs Kafka 3.1 or newer",
    ),
    Code.topic_already_exists: (BrokerError, "a topic of this name exists already"),
    Code.invalid_partitions: (ConfigError, "the cluster does not take this number of partitions"),
    Code.invalid_replication_factor: (
        ConfigError,
        "topics cannot be stored so often on as many brokers as run now; lower replication=, or start brokers",
    ),
    Code.invalid_replica_assignment: (ConfigError, "the partitions cannot be placed on these brokers"),
    Code.invalid_config: (ConfigError, "the cluster refuses a setting"),
    Code.not_controller: (BrokerUnavailable, "the cluster's controller is another broker by now"),
    Code.invalid_request: (BrokerError, "the broker refused the request; its log says why"),
    Code.unsupported_for_message_format: (ConfigError, "the topic stores records in a format older than Kafka 0.11"),
    Code.policy_violation: (ConfigError, "a policy of the cluster forbids it; ask its operator"),
    Code.out_of_order_sequence_number: (BrokerUnavailable, "the broker has lost count of this producer's records"),
    Code.duplicate_sequence_number: (PublishUnknown, "the broker has stored records of this number before"),
    Code.invalid_producer_epoch: (BrokerUnavailable, "the broker takes another producer for this one"),
    Code.invalid_producer_id_mapping: (BrokerUnavailable, "the broker takes another producer for this one"),
    Code.unknown_producer_id: (BrokerUnavailable, "the broker has forgotten this producer"),
    Code.producer_fenced: (BrokerUnavailable, "the broker takes another producer for this one"),
    Code.security_disabled: (ConfigError, "the cluster has no access control"),
    Code.operation_not_attempted: (NotAttempted, "not done, because something before it failed"),
    Code.kafka_storage_error: (BrokerUnavailable, "the broker's disk failed; its log says why"),
    Code.sasl_authentication_failed: (AuthenticationError, "the user name or password was refused"),
    Code.reassignment_in_progress: (BrokerUnavailable, "the partitions are being moved"),
    Code.non_empty_group: (ConfigError, "the group has members; end them first"),
    Code.group_id_not_found: (NotFound, "there is no such group, or it is of another kind"),
    Code.fetch_session_id_not_found: (BrokerUnavailable, "the broker has forgotten what was read"),
    Code.invalid_fetch_session_epoch: (BrokerUnavailable, "the broker has lost count of what was read"),
    Code.listener_not_found: (
        BrokerUnavailable,
        "the partition's leader cannot be reached where its clients connect; its listeners differ from the others'",
    ),
    Code.topic_deletion_disabled: (ConfigError, "the cluster deletes no topics: its delete.topic.enable is false"),
    Code.fenced_leader_epoch: (BrokerUnavailable, "the partition has another leader by now"),
    Code.unknown_leader_epoch: (BrokerUnavailable, "the broker has not heard of the partition's leader yet"),
    Code.unsupported_compression_type: (ConfigError, "the broker does not take this compression=; take another one"),
    Code.stale_broker_epoch: (BrokerUnavailable, "the broker has just started anew"),
    Code.offset_not_available: (
        BrokerUnavailable,
        "the partition's leader is new and has yet to learn where its log ends",
    ),
    Code.member_id_required: (BrokerUnavailable, "the group wants the member to come again"),
    Code.preferred_leader_not_available: (BrokerUnavailable, "the partition's preferred leader is away"),
    Code.group_max_size_reached: (ConfigError, "the group has as many members as the brokers' group.max.size allows"),
    Code.fenced_instance_id: (
        ConfigError,
        "another live member has the same instance=; give each process its own, or none",
    ),
    Code.eligible_leaders_not_available: (BrokerUnavailable, "no broker can lead the partition at the moment"),
    Code.group_subscribed_to_topic: (ConfigError, "members of the group read the topic; end them first"),
    Code.invalid_record: (
        ConfigError,
        "the broker refused a record; does the topic have cleanup.policy=compact, which needs a key in each?",
    ),
    Code.unstable_offset_commit: (BrokerUnavailable, "a transaction has yet to say what is committed"),
    Code.throttling_quota_exceeded: (BrokerUnavailable, "the user has changed more than its quota allows for now"),
    Code.resource_not_found: (NotFound, "there is nothing of this name"),
    Code.unacceptable_credential: (AuthenticationError, "the credentials are not acceptable"),
    Code.unknown_topic_id: (NotFound, "the topic was deleted, and perhaps made anew"),
    Code.inconsistent_topic_id: (NotFound, "the topic was deleted and made anew"),
    Code.fetch_session_topic_id_error: (BrokerUnavailable, "the broker has lost count of what was read"),
    Code.new_leader_elected: (BrokerUnavailable, "the partition has another leader by now"),
    Code.offset_moved_to_tiered_storage: (BrokerUnavailable, "the record has moved to the cluster's remote storage"),
    Code.fenced_member_epoch: (DeliveryLost, "the group has shared out its partitions anew"),
    Code.unreleased_instance_id: (
        ConfigError,
        "another live member has the same instance=; give each process its own, or none",
    ),
    Code.unsupported_assignor: (ConfigError, "another kind of client uses this group; take another group"),
    Code.stale_member_epoch: (DeliveryLost, "the group has shared out its partitions anew"),
    Code.invalid_record_state: (DeliveryLost, "the record belongs to another consumer by now"),
    Code.rebootstrap_required: (BrokerUnavailable, "the broker asks its clients to connect anew"),
}
_TLS_RECORDS: Final = (
    "WRONG_VERSION_NUMBER",
    "UNEXPECTED_EOF",
    "EOF occurred",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH",
)
_CLIENT_WANTED: Final = (
    "CERTIFICATE_REQUIRED",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_NO_CERTIFICATE",
)
_CLIENT_REFUSED: Final = (
    "ALERT_UNKNOWN_CA",
    "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_CERTIFICATE_EXPIRED",
    "ALERT_ACCESS_DENIED",
)
_MOST: Final = 300
"""Characters of what a broker says that are passed on."""


def of_code(code: int, what: str, said: str | None = None) -> BrokerError:
    """Return the error for a broker's answer *code* to *what*, with what it *said* beside it.

    *what* names the operation and the resource, for rights as Kafka does: "WRITE on topic orders".  The cause is a `Refused`.
    """
    said = one_line(said or "")
    known = _known(code)
    if known in DENIED:
        error: BrokerError = AuthorizationError(f"the user may not do this: {what}; {RIGHTS}")
    elif known is not None and known in _TOLD:
        kind, help_ = _TOLD[known]
        error = kind(f"{what}: {help_}" + (f" ({said})" if said else ""))
    else:
        kind = BrokerUnavailable if known in RETRY else BrokerError
        error = kind(f"{what}: the broker answered {_name(code)} ({code})" + (f": {said}" if said else ""))
    error.__cause__ = Refused(code, said)
    return error


def translate(error: BaseException, what: str, *, certificate: bool = False) -> BrokerError:
    """Return *error*, met in *what* ("connecting to h:9092"), as an error of ours, with the cause set.

    *certificate* tells whether we have shown one of our own.  A lost connection is `BrokerUnavailable`; whether what was under
    way has happened only the caller can tell.
    """
    if isinstance(error, BrokerError):
        return error
    translated: BrokerError
    if any(isinstance(inner, ssl.SSLError) for inner in _chain(error)):
        translated = _of_tls(error, what, certificate=certificate)
    elif isinstance(error, (TimeoutError, asyncio.TimeoutError)) and not str(error):
        translated = BrokerUnavailable(f"{what}: no answer in time")
    elif isinstance(error, (EOFError, asyncio.IncompleteReadError)):
        translated = BrokerUnavailable(f"{what}: the broker closed the connection")
    elif isinstance(error, OSError):
        translated = BrokerUnavailable(f"{what}: {one_line(str(error)) or type(error).__name__}")
    else:
        translated = BrokerError(f"{what}: {type(error).__name__}: {one_line(str(error))}".rstrip(": "))
    translated.__cause__ = error
    return translated


def _of_tls(error: BaseException, what: str, *, certificate: bool) -> BrokerError:
    text = " ".join(str(inner) for inner in _chain(error))
    if "CERTIFICATE_VERIFY_FAILED" in text:
        found = re.search(r"certificate verify failed: ([^(\]]+)", text)
        reason = f": {one_line(found[1])}" if found else ""
        if "mismatch" in text or "is not valid for" in text:
            return BrokerUnavailable(
                f"{what}: the broker's certificate was refused{reason}; name the host as the certificate does, "
                "in the URL and in the brokers' advertised.listeners"
            )
        return BrokerUnavailable(
            f"{what}: the broker's certificate was refused{reason}; name the authority that signed it in ca_file="
        )
    if any(sign in text for sign in (*_CLIENT_WANTED, *_CLIENT_REFUSED)):
        if certificate:
            return AuthenticationError(
                f"{what}: the broker refused our certificate: {_alert(text)}; is cert_file= signed by an authority that it trusts?"
            )
        return AuthenticationError(
            f"{what}: the broker wants a certificate of ours: {_alert(text)}; give cert_file= and key_file="
        )
    hint = (
        "; does this port speak TLS? kafka:// is without"
        if any(sign in text for sign in _TLS_RECORDS)
        else "; does the broker want a cert_file=?"
    )
    return BrokerUnavailable(f"{what}: TLS failed: {one_line(str(error))}{hint}")


def _alert(text: str) -> str:
    found = re.search(r"\[SSL: ([A-Z0-9_]+)\]", text)
    return found[1].lower().replace("_", " ") if found else "see its log"


def one_line(text: str) -> str:
    """Return *text* on one line, not too long, without what cannot be printed."""
    text = " ".join(text.split()).rstrip(".")
    return "".join(character if character.isprintable() else "?" for character in text[:_MOST])


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and what it was made from."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        yield inner
        inner = inner.__cause__ or inner.__context__


def _known(code: int) -> Code | None:
    try:
        return Code(code)
    except ValueError:
        return None


def _name(code: int) -> str:
    known = _known(code)
    return "an error unknown to this release" if known is None else known.name.upper()
