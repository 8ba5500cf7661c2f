"""Mutants of the Redis driver: its connection, and publishing."""

from __future__ import annotations

from .mutant import Mutant, driver, served

HOME = "brokerkit/drivers/redis/"
OPTIONS = HOME + "_options.py"
ERRORS = HOME + "_errors.py"
CONNECTION = HOME + "_link.py"
OUTBOX = HOME + "_publish.py"
FRAMES = HOME + "_frames.py"
PRODUCER = HOME + "lua/producer.lua"
PUBLISH = HOME + "lua/publish.lua"
PUBLISH_QUEUE = HOME + "lua/publish_queue.lua"
PUBLISH_TOPIC = HOME + "lua/publish_topic.lua"
STORE = HOME + "lua/store.lua"

LINK: tuple[Mutant, ...] = (
    Mutant(
        name="reconnect forgets what was sent",
        breaks="a call whose answer was lost is sent again",
        file=CONNECTION,
        old="        self._waiting.extend(again)\n",
        new="",
        tests=driver("test_link", "test_calls_keep_their_order_across_a_reconnect"),
    ),
    Mutant(
        name="reconnect sends new calls first",
        breaks="calls keep their order across a reconnect",
        file=CONNECTION,
        old="        self._waiting.extend(again)\n        self._waiting.extend(waiting)\n",
        new="        self._waiting.extend(waiting)\n        self._waiting.extend(again)\n",
        tests=driver("test_link", "test_calls_keep_their_order_across_a_reconnect"),
    ),
    Mutant(
        name="all calls are sent again",
        breaks="what must not run twice is sent once",
        file=CONNECTION,
        old="if call.again and not call.future.done():",
        new="if not call.future.done():",
        tests=driver("test_link", "test_what_was_sent_is_sent_again_unless_it_must_not_be"),
    ),
    Mutant(
        name="forgotten scripts stay forgotten",
        breaks="SCRIPT FLUSH is healed",
        file=CONNECTION,
        old="value.__class__ is native.NoScriptError and call.reloads < _RELOADS",
        new="value.__class__ is native.NoScriptError and call.reloads < 0",
        tests=driver("test_link", "test_scripts_that_the_server_forgot_are_loaded_again"),
    ),
    Mutant(
        name="a cancelled call's answer goes to the next",
        breaks="each caller gets its own answer",
        file=CONNECTION,
        old="            call = self._unanswered.popleft()\n            if call.script",
        new="            while self._unanswered[0].future.done() and len(self._unanswered) > 1:\n"
        "                self._bytes -= len(self._unanswered.popleft().packed)\n"
        "            call = self._unanswered.popleft()\n            if call.script",
        tests=driver("test_link", "test_the_answer_to_who_has_gone_is_nobody_elses"),
    ),
    Mutant(
        name="an unknown outcome is called certain",
        breaks="BrokerUnavailable means that nothing was stored",
        file=CONNECTION,
        old="            if now >= call.deadline and not call.future.done():\n"
        '                call.future.set_exception(Unanswered(f"no answer',
        new="            if now >= call.deadline and not call.future.done():\n"
        '                call.future.set_exception(BrokerUnavailable(f"no answer',
        tests=driver("test_link", "test_a_deadline_passes_while_the_server_stands_still"),
    ),
    Mutant(
        name="a sealed answer does not wait",
        breaks="with durability=aof an answer means that it is on disk",
        file=CONNECTION,
        old="            if not self._sealed:\n",
        new="            if not self._sealed or call.packed is not _WAITAOF:\n",
        tests=driver("test_link", "test_an_answer_that_was_not_sealed_is_none"),
    ),
    Mutant(
        name="a sealed answer does not look at the seal",
        breaks="with durability=aof an answer means that it is on disk",
        file=CONNECTION,
        old="not value or value[0] < 1",
        new="not value",
        tests=driver("test_link", "test_an_answer_that_was_not_sealed_is_none"),
    ),
    Mutant(
        name="the password is shown",
        breaks="no text shows a password",
        file=OPTIONS,
        old='    user = f"{url.username}@" if url.username else ""\n',
        new='    secret = f":{url.password.reveal()}" if url.password else ""\n'
        '    user = f"{url.username}{secret}@" if url.username else ""\n',
        tests=driver("test_options", "test_a_password_is_in_no_text"),
    ),
    Mutant(
        name="the server's answer shows the password",
        breaks="no text shows a password",
        file=ERRORS,
        old="    if not cut:\n",
        new="    if not cut or cut:\n",
        tests=driver("test_errors", "test_a_command_that_is_not_known_shows_no_arguments"),
    ),
)

PUBLISHING: tuple[Mutant, ...] = (
    Mutant(
        name="a batch that is sent again is stored again",
        breaks="a lost answer doubles nothing",
        file=PRODUCER,
        old="  if number == batch then return reply end\n",
        new="",
        tests=driver(
            "test_publish",
            "test_a_batch_whose_answer_was_lost_is_stored_once_and_its_receipts_are_those_of_the_first[queue]",
        ),
    ),
    Mutant(
        name="a batch that comes late is stored",
        breaks="what was given up is not stored behind what followed it",
        file=PRODUCER,
        old="if number > batch then return redis.error_reply",
        new="if number > batch + 1e9 then return redis.error_reply",
        tests=driver("test_queue_calls", "test_a_batch_is_stored_once_and_not_behind_a_later_one[redis-publish_queue]"),
    ),
    Mutant(
        name="a topic does not know its producers",
        breaks="a lost answer doubles nothing",
        file=PUBLISH_TOPIC,
        old="fields[#fields + 1] = ARGV[1]\nfields[#fields + 1] = value_of(ARGV[2], reply)\n",
        new="",
        tests=driver("test_queue_calls", "test_a_batch_is_stored_once_and_not_behind_a_later_one[redis-publish_topic]"),
    ),
    Mutant(
        name="a batch is not sent again",
        breaks="a publish survives a short outage",
        file=OUTBOX,
        old="args, timeout=left)",
        new="args, timeout=left, again=False)",
        tests=driver(
            "test_publish",
            "test_a_batch_whose_answer_was_lost_is_stored_once_and_its_receipts_are_those_of_the_first[queue]",
        ),
    ),
    Mutant(
        name="the window is ignored",
        breaks="of one id one message is stored",
        file=PUBLISH,
        old="if not known or tonumber(known) <= now then",
        new="if not known or known then",
        tests=served("Deduplicating::test_a_second_message_of_an_id_is_dropped_and_its_receipt_says_so"),
    ),
    Mutant(
        name="the window never ends",
        breaks="after its window an id is new",
        file=PUBLISH,
        old="text(now + entity.dedup * 1000)",
        new="text(now + entity.dedup * 1000000)",
        tests=served("Deduplicating::test_after_its_window_an_id_is_new"),
    ),
    Mutant(
        name="a duplicate extends the window",
        breaks="after its window an id is new",
        file=PUBLISH,
        old="    numbers[#numbers + 1] = text(number)\n",
        new="    numbers[#numbers + 1] = text(number)\n"
        "    redis.call('ZADD', ids, text(now + entity.dedup * 1000), ARGV[i + 1])\n",
        tests=served("Deduplicating::test_after_its_window_an_id_is_new"),
    ),
    Mutant(
        name="a duplicate's number is another's",
        breaks="a receipt tells which message was a duplicate",
        file=PUBLISH,
        old="    numbers[#numbers + 1] = text(number)\n",
        new="    if number > 0 then numbers[#numbers + 1] = text(number) end\n",
        tests=served("Deduplicating::test_an_id_twice_in_one_call_is_stored_once"),
    ),
    Mutant(
        name="a delay is forgotten",
        breaks="a delayed message is never early",
        file=FRAMES,
        old="return not (record.delay or record.deliveries",
        new="return not (record.deliveries",
        tests=driver("test_queue", "test_delayed_messages_are_never_early_and_not_late[redis]"),
    ),
    Mutant(
        name="a key is hashed for each copy",
        breaks="equal keys are in one partition",
        file=FRAMES,
        old="crc32(key) if key is not None else spread",
        new="crc32(key, spread) if key is not None else spread",
        tests=served("DriverPublish::test_equal_keys_are_in_one_partition_in_publish_order"),
    ),
    Mutant(
        name="a failure is passed over",
        breaks="after a failed message of a key no later one is stored",
        file=OUTBOX,
        old="                if isinstance(record.address, Topic) and record.key is not None:\n"
        "                    refused.add(line)\n",
        new="",
        tests=driver("test_publish", "test_a_body_that_is_too_large_fails_alone"),
    ),
    Mutant(
        name="the numbers of a queue are not kept",
        breaks="no position is used twice",
        file=STORE,
        old="  redis.call('HSET', q.key, 'seq', text(q.seq))\n",
        new="",
        tests=driver("test_queue_calls", "test_no_number_is_given_twice[redis]"),
    ),
    Mutant(
        name="nobody is woken",
        breaks="a message is there at once",
        file=PUBLISH_QUEUE,
        old="wake(E, count)",
        new="wake(E, 0)",
        tests=driver(
            "test_queue_calls", "test_messages_that_come_together_while_a_consumer_waits_are_there_at_once[redis]"
        ),
    ),
    Mutant(
        name="readers are not told",
        breaks="a message is there at once",
        file=PUBLISH_TOPIC,
        old="tell(E .. ':c:' .. p, #line",
        new="tostring(E .. ':c:' .. p, #line",
        tests=driver("test_topic_calls", "test_a_record_that_comes_while_a_reader_waits_is_there_at_once[redis]"),
    ),
)
