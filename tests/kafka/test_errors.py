"""What brokers answer and connections suffer, and what the program is told."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest
from kio.schema.errors import ErrorCode

from brokerkit.drivers.kafka import _errors as errors
from brokerkit.drivers.kafka._errors import Refused, Unanswered, of_code, one_line, translate
from brokerkit.errors import (
    AuthenticationError,
    AuthorizationError,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
    DeliveryLost,
    InvalidName,
    NotFound,
    PositionLost,
    PublishUnknown,
    TooLarge,
)

# ---------------------------------------------------------------------- codes


@pytest.mark.parametrize("code", [code for code in ErrorCode if code is not ErrorCode.none], ids=lambda code: code.name)
def test_every_code_is_an_error_of_ours(code: ErrorCode) -> None:
    error = of_code(int(code), "WRITE on topic orders", "as it says")
    assert "WRITE on topic orders" in str(error)
    assert isinstance(error.__cause__, Refused)
    assert error.__cause__.code == code
    assert code.name.upper() in str(error.__cause__)


def test_a_code_of_a_later_kafka_is_an_error_too() -> None:
    error = of_code(31000, "doing this", "a new reason")
    assert type(error) is BrokerError
    assert str(error) == "doing this: the broker answered an error unknown to this release (31000): a new reason"


@pytest.mark.parametrize(
    "code, kind, text",
    [
        (ErrorCode.unknown_server_error, BrokerError, "its log says why"),
        (ErrorCode.offset_out_of_range, PositionLost, "not in the log any more"),
        (ErrorCode.unknown_topic_or_partition, NotFound, "no such topic"),
        (ErrorCode.unknown_topic_id, NotFound, "deleted"),
        (ErrorCode.not_leader_or_follower, BrokerUnavailable, "another broker"),
        (ErrorCode.request_timed_out, Unanswered, "in time"),
        (ErrorCode.message_too_large, TooLarge, r"max\.message\.bytes"),
        (ErrorCode.not_coordinator, BrokerUnavailable, "coordinator"),
        (ErrorCode.invalid_topic_exception, InvalidName, "name for a topic"),
        (ErrorCode.not_enough_replicas, BrokerUnavailable, r"min\.insync\.replicas"),
        (ErrorCode.not_enough_replicas_after_append, PublishUnknown, "stored, but"),
        (ErrorCode.illegal_generation, DeliveryLost, "anew"),
        (ErrorCode.inconsistent_group_protocol, ConfigError, "another kind of client"),
        (ErrorCode.invalid_session_timeout, ConfigError, r"session=.*group\.min\.session\.timeout\.ms"),
        (ErrorCode.invalid_timestamp, ConfigError, r"clock.*message\.timestamp"),
        (ErrorCode.sasl_authentication_failed, AuthenticationError, "user name or password"),
        (ErrorCode.illegal_sasl_state, ConfigError, "leave them out"),
        (ErrorCode.unsupported_version, ConfigError, "3.1 or newer"),
        (ErrorCode.invalid_replication_factor, ConfigError, "replication="),
        (ErrorCode.policy_violation, ConfigError, "as it says"),
        (ErrorCode.unsupported_compression_type, ConfigError, "compression="),
        (ErrorCode.group_max_size_reached, ConfigError, r"group\.max\.size"),
        (ErrorCode.fenced_instance_id, ConfigError, "instance="),
        (ErrorCode.non_empty_group, ConfigError, "has members"),
        (ErrorCode.invalid_record, ConfigError, "needs a key"),
        (ErrorCode.throttling_quota_exceeded, BrokerUnavailable, "quota"),
        (ErrorCode.concurrent_transactions, BrokerUnavailable, r"CONCURRENT_TRANSACTIONS \(51\): as it says"),
        (ErrorCode.voter_not_found, BrokerError, r"VOTER_NOT_FOUND \(127\): as it says"),
    ],
)
def test_a_code_says_what_to_do(code: ErrorCode, kind: type[BrokerError], text: str) -> None:
    error = of_code(code, "doing this", "as it says")
    assert type(error) is kind
    with pytest.raises(BrokerError, match=text):
        raise error


@pytest.mark.parametrize("code", sorted(errors.DENIED))
@pytest.mark.parametrize("what", ["WRITE on topic orders", "READ on group orders..billing", "CREATE on topic orders"])
def test_a_missing_right_is_named_with_its_resource(code: int, what: str) -> None:
    error = of_code(code, what)
    assert isinstance(error, AuthorizationError)
    assert str(error) == (
        f"the user may not do this: {what}; README, section Kafka, has the rights that brokerkit needs"
    )
    assert not error.retryable


def test_what_can_be_tried_again_says_so() -> None:
    """A partition that is gone may be on its way: who looks at the cluster again knows more than the code."""
    gone = {ErrorCode.unknown_topic_or_partition, ErrorCode.unknown_topic_id, ErrorCode.inconsistent_topic_id}
    for code in errors.RETRY - gone:
        assert of_code(code, "doing this").retryable, code
    for code in errors.STALE_COORDINATOR | (errors.STALE_LEADER - gone) | errors.LOST_SESSION:
        assert of_code(code, "doing this").retryable, code
    for code in errors.LOST_MEMBER:
        assert isinstance(of_code(code, "doing this"), DeliveryLost), code


def test_what_a_code_means_is_one_thing() -> None:
    sets = (errors.DENIED, errors.STALE_LEADER, errors.STALE_COORDINATOR, errors.LOST_MEMBER, errors.LOST_SESSION)
    assert len({code for each in sets for code in each}) == sum(len(each) for each in sets)
    assert errors.STALE_COORDINATOR < errors.RETRY
    assert not errors.RETRY & (errors.DENIED | errors.LOST_MEMBER | errors.LOST_SESSION)
    assert 6 in errors.STALE_LEADER  # plain numbers will do


def test_what_a_broker_says_is_cut_and_on_one_line() -> None:
    error = of_code(ErrorCode.invalid_config, "doing this", "one\ntwo\x1b[31m\t" + "x" * 10_000)
    assert "one two?[31m xxx" in str(error)
    assert len(str(error)) < 400
    assert one_line(" a \n b. ") == "a b"


# ---------------------------------------------------------------------- connections

VERIFY = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "


@pytest.mark.parametrize(
    "error, certificate, kind, text",
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), False, BrokerUnavailable, "refused"),
        (socket.gaierror(-2, "Name or service not known"), False, BrokerUnavailable, "Name or service"),
        (ConnectionResetError(), False, BrokerUnavailable, "ConnectionResetError"),
        (EOFError(), False, BrokerUnavailable, "closed the connection"),
        (TimeoutError(), False, BrokerUnavailable, "no answer in time"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), False, BrokerUnavailable, "Connection timed out"),
        (ssl.SSLCertVerificationError(1, VERIFY + "self-signed certificate (_ssl.c:1)"), False, BrokerUnavailable, "ca_file="),
        (ssl.SSLCertVerificationError(1, VERIFY + "certificate has expired (_ssl.c:1)"), False, BrokerUnavailable, "expired"),
        (ssl.SSLCertVerificationError(1, VERIFY + "Hostname mismatch, certificate is not valid for 'h'"), False, BrokerUnavailable, "advertised"),
        (ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert"), False, AuthenticationError, "certificate required; give cert_file="),
        (ssl.SSLError(1, "[SSL: SSLV3_ALERT_BAD_CERTIFICATE] sslv3 alert"), False, AuthenticationError, "bad certificate; give cert_file="),
        (ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert"), True, AuthenticationError, "refused our certificate: .*unknown ca"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), False, BrokerUnavailable, "does this port speak TLS"),
        (ssl.SSLEOFError(8, "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred"), False, BrokerUnavailable, "does this port speak TLS"),
        (ssl.SSLError(1, "[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE] failure"), False, BrokerUnavailable, "want a cert_file"),
        (ValueError("odd"), False, BrokerError, "ValueError: odd"),
    ],
)  # fmt: skip
def test_what_a_connection_suffers_says_what_to_do(
    error: Exception, certificate: bool, kind: type[BrokerError], text: str
) -> None:
    translated = translate(error, "connecting to h:9092", certificate=certificate)
    assert type(translated) is kind
    assert translated.__cause__ is error
    assert str(translated).startswith("connecting to h:9092: ")
    with pytest.raises(BrokerError, match=text):
        raise translated


def test_the_error_below_another_counts() -> None:
    try:
        try:
            raise ssl.SSLCertVerificationError(1, VERIFY + "self-signed certificate")
        except ssl.SSLError as inner:
            raise ConnectionAbortedError from inner
    except OSError as outer:
        assert "ca_file=" in str(translate(outer, "connecting to h:9092"))


def test_an_error_of_ours_stays_as_it_is() -> None:
    error = NotFound("no topic")
    assert translate(error, "doing this") is error
