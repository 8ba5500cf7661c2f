"""Mutants of the Redis driver: queues."""

from __future__ import annotations

from .mutant import Mutant, driver

HOME = "brokerkit/drivers/redis/"
CONSUMER = HOME + "_queue.py"
MEMBER = HOME + "_queue_member.py"
COMMON = HOME + "lua/common.lua"
STORE = HOME + "lua/store.lua"
BASE = HOME + "lua/queue_base.lua"
QUICK = HOME + "lua/queue_quick.lua"
TAKE = HOME + "lua/queue_take.lua"
SETTLE = HOME + "lua/queue_settle.lua"
OUTCOME = HOME + "lua/queue_outcome.lua"
RELEASE = HOME + "lua/queue_release.lua"
RECOVER = HOME + "lua/queue_recover.lua"
RENEW = HOME + "lua/queue_renew.lua"
LEAVE = HOME + "lua/queue_leave.lua"
REDRIVE = HOME + "lua/admin_redrive.lua"
PURGE = HOME + "lua/admin_purge.lua"

DEAD = driver("test_queue_calls", "test_what_the_dead_held_comes_before_what_is_new[redis-plain]")
RELEASED_ONCE = driver("test_queue_calls", "test_what_is_released_is_held_no_more_and_once_in_line[redis]")
OVER = driver("test_queue_calls", "test_calls_of_a_session_that_is_over_do_nothing[redis]")
RENAMED = driver("test_queue_calls", "test_calls_under_a_name_that_was_given_up_do_nothing[redis]")
NONE = driver(
    "test_queue_calls", "test_of_copies_that_cannot_all_be_stored_none_is_and_the_message_is_still_held[redis]"
)
DUE = driver("test_queue_calls", "test_what_is_due_is_handed_out_and_nothing_else[redis]")
LOST_REPLY = driver(
    "test_queue_faults", "test_what_a_lost_reply_has_handed_out_comes_again_at_once_and_uncounted[redis]"
)
LOST_OUTCOME = driver("test_queue_faults", "test_a_settlement_whose_reply_is_lost_counts_once[redis]")
RELEASED = driver("test_queue", "test_what_is_released_comes_again_first_and_uncounted[redis]")
LEFT = driver("test_queue", "test_leaving_hands_back_more_than_one_call_moves[redis]")
SUSPECT = driver("test_queue", "test_a_suspect_comes_alone_and_is_not_starved[redis]")

SERVED_QUEUES: tuple[Mutant, ...] = (
    Mutant(
        name="what the dead held is dropped",
        breaks="a message is there until it is settled",
        file=BASE,
        old="    hand_back(elements)\n    in_chunks('HDEL', key, fields)\n",
        new="    in_chunks('HDEL', key, fields)\n",
        tests=DEAD,
    ),
    Mutant(
        name="what the dead held is not counted",
        breaks="deliveries count crashes",
        file=BASE,
        old="counted and one_more(element) or element",
        new="element",
        tests=DEAD,
    ),
    Mutant(
        name="nobody looks for the dead",
        breaks="what a dead consumer held comes again",
        file=TAKE,
        old="  more = reclaim() or more\n",
        new="",
        tests=DEAD,
    ),
    Mutant(
        name="the living are taken for dead",
        breaks="a message has one owner at a time",
        file=TAKE,
        old="redis.call('ZRANGE', E .. ':n', '-inf', text(now), 'BYSCORE', 'LIMIT', 0, 20, 'WITHSCORES')",
        new="redis.call('ZRANGE', E .. ':n', '-inf', text(now + lease), 'BYSCORE', 'LIMIT', 0, 20, 'WITHSCORES')",
        tests=driver("test_queue_calls", "test_what_the_living_hold_is_theirs[redis-priorities]"),
    ),
    Mutant(
        name="what goes back goes to the end",
        breaks="what is handed back comes first",
        file=BASE,
        old="  line_up('LPUSH', elements)\n",
        new="  line_up('RPUSH', elements)\n",
        tests=RELEASED,
    ),
    Mutant(
        name="what goes back is turned around",
        breaks="what is handed back keeps its order",
        file=BASE,
        old="return numbers[a] < numbers[b]",
        new="return numbers[a] > numbers[b]",
        tests=DEAD,
    ),
    Mutant(
        name="a release counts",
        breaks="what never began counts no delivery",
        file=RELEASE,
        old="        elements[#elements + 1] = element\n",
        new="        elements[#elements + 1] = one_more(element)\n",
        tests=RELEASED,
    ),
    Mutant(
        name="a release that is sent again is two",
        breaks="a message is in one place",
        file=RELEASE,
        old="      if element and not seen[number] then\n",
        new="      if element then\n",
        tests=RELEASED_ONCE,
    ),
    Mutant(
        name="a release keeps what it hands back",
        breaks="a message has one owner at a time",
        file=RELEASE,
        old="  in_chunks('HDEL', held, numbers)\n",
        new="",
        tests=RELEASED_ONCE,
    ),
    Mutant(
        name="leaving counts",
        breaks="what a consumer hands back counts no delivery",
        file=LEAVE,
        old="undo(name, false, budget)",
        new="undo(name, true, budget)",
        tests=LEFT,
    ),
    Mutant(
        name="leaving forgets the rest",
        breaks="leaving hands everything back at once",
        file=LEAVE,
        old="        if not all then more = 1 end\n",
        new="",
        tests=LEFT,
    ),
    Mutant(
        name="the dead may settle",
        breaks="an acknowledgement after the lease was lost has no effect and says so",
        file=SETTLE,
        old="ARGV[1]) or 0) > 1 and 1 or 0",
        new="ARGV[1]) or 0) > 1 and 1 or 1",
        tests=OVER,
    ),
    Mutant(
        name="the dead may publish",
        breaks="what a lost message publishes is not stored",
        file=OUTCOME,
        old=", ARGV[1]) or 0) <= 1 then return {0} end",
        new=", ARGV[1]) or 0) < 0 then return {0} end",
        tests=OVER,
    ),
    Mutant(
        name="copies are stored again",
        breaks="copies and acknowledgement happen once, and together",
        file=OUTCOME,
        old="if done[number] or redis.call('HEXISTS', held, number) == 0 then",
        new="if done[number] then",
        tests=LOST_OUTCOME,
    ),
    Mutant(
        name="what is refused is settled all the same",
        breaks="copies and acknowledgement are both or none",
        file=OUTCOME,
        old="      results[#results + 1] = problem\n",
        new="      results[#results + 1] = problem\n      done[#done + 1] = number\n",
        tests=NONE,
    ),
    Mutant(
        name="some copies are stored",
        breaks="copies and acknowledgement are both or none",
        file=OUTCOME,
        old="    if problem then\n",
        new="    if problem then\n      for i = 1, #entities do push(entities[i], ARGV[at + 2 * i + 1]) end\n",
        tests=NONE,
    ),
    Mutant(
        name="recovering drops what is unknown",
        breaks="what a lost reply has handed out is there",
        file=RECOVER,
        old="  hand_back(elements)\n",
        new="",
        tests=RENAMED,
    ),
    Mutant(
        name="recovering leaves what is unknown",
        breaks="what a lost reply has handed out comes at once",
        file=CONSUMER,
        old="        except Unanswered:\n            session.unsure = True\n",
        new="        except Unanswered:\n",
        tests=LOST_REPLY,
    ),
    Mutant(
        name="the old name stays alive",
        breaks="a call that comes late does nothing",
        file=RECOVER,
        old="        redis.call('ZREM', E .. ':n', old)\n",
        new="",
        tests=RENAMED,
    ),
    Mutant(
        name="a lost lease is renewed back",
        breaks="who has lost a message stays without it",
        file=RENEW,
        old="deadline_of(name) and renew(name) or 0",
        new="renew(name)",
        tests=OVER,
    ),
    Mutant(
        name="what comes late is handed out",
        breaks="a process that stood still hands out nothing that others have",
        file=CONSUMER,
        old="        if time.monotonic() >= session.owned or state == _UNKNOWN:\n",
        new="        if state == _UNKNOWN:\n",
        tests=driver("test_queue_calls", "test_an_answer_that_is_read_too_late_hands_out_nothing[redis]"),
    ),
    Mutant(
        name="a lost session is not told of",
        breaks="the program hears what it has lost",
        file=MEMBER,
        old="            self._tasks.start_soon(self._tell, held)\n",
        new="            pass\n",
        tests=driver("test_queue_faults", "test_revoked_may_settle_in_vain_and_fail[redis]"),
    ),
    Mutant(
        name="suspects come with others",
        breaks="from its third delivery on a message is alone",
        file=TAKE,
        old="  if redis.call('HLEN', E .. ':h:' .. name) <= proven then\n",
        new="  if redis.call('HLEN', E .. ':h:' .. name) >= 0 then\n",
        tests=SUSPECT,
    ),
    Mutant(
        name="suspects wait for what holds up nothing",
        breaks="what was in hand for a lease holds up nothing",
        file=TAKE,
        old="local proven = tonumber(ARGV[7] or 0)\n",
        new="local proven = 0\n",
        tests=driver(
            "test_queue_calls", "test_what_comes_alone_comes_beside_no_more_than_a_session_has_lived_with[redis]"
        ),
    ),
    Mutant(
        name="others come with a suspect",
        breaks="from its third delivery on a message is alone",
        file=TAKE,
        old="return #taken > 0 and LONELY or 0",
        new="return 0",
        tests=SUSPECT,
    ),
    Mutant(
        name="a suspect too late",
        breaks="from its third delivery on a message is alone",
        file=BASE,
        old="if deliveries >= LONE then",
        new="if deliveries > LONE then",
        tests=driver("test_queue_calls", "test_the_second_time_that_an_owner_dies_a_message_comes_alone[redis]"),
    ),
    Mutant(
        name="expired messages are handed out, quickly",
        breaks="what has expired is never delivered",
        file=QUICK,
        old="struct.unpack('>I6', until_) <= ms then plain",
        new="struct.unpack('>I6', until_) <= 0 then plain",
        tests=driver("test_queue", "test_expired_messages_are_dropped_and_counted_also_behind_many[redis]"),
    ),
    Mutant(
        name="expired messages are handed out",
        breaks="what has expired is never delivered",
        file=TAKE,
        old="struct.unpack('>I6', until_) <= now then",
        new="struct.unpack('>I6', until_) <= 0 then",
        tests=driver("test_queue", "test_expired_messages_are_dropped_and_counted_also_behind_many[redis]"),
    ),
    Mutant(
        name="delayed messages come when somebody looks",
        breaks="a delayed message is never early",
        file=TAKE,
        old="redis.call('ZRANGE', E .. ':d', '-inf', text(now), 'BYSCORE'",
        new="redis.call('ZRANGE', E .. ':d', '-inf', '+inf', 'BYSCORE'",
        tests=DUE,
    ),
    Mutant(
        name="delayed messages come a moment early",
        breaks="a delayed message is never early",
        file=STORE,
        old="local due = now + delay + 1",
        new="local due = now + delay - 20",
        tests=driver("test_queue", "test_delayed_messages_are_never_early_and_not_late[redis]"),
    ),
    Mutant(
        name="what is due is dropped",
        breaks="what is due is not forgotten",
        file=TAKE,
        old="    line_up('RPUSH', due)\n    in_chunks('ZREM', E .. ':d', due)\n",
        new="    in_chunks('ZREM', E .. ':d', due)\n",
        tests=DUE,
    ),
    Mutant(
        name="the lowest priority first",
        breaks="the highest priority comes first",
        file=TAKE,
        old="  for p = priorities - 1, 0, -1 do take_from",
        new="  for p = 0, priorities - 1 do take_from",
        tests=driver("test_queue", "test_priorities[redis]"),
    ),
    Mutant(
        name="a plain take does not look at who is dead",
        breaks="what a dead consumer held comes before what is new",
        file=QUICK,
        old="and tonumber(first[2]) > ms\n",
        new="and true\n",
        tests=DEAD,
    ),
    Mutant(
        name="a queue gives without end",
        breaks="a process that stands still is given few messages",
        file=COMMON,
        old="now + (more - 1) / SHARE",
        new="now + more / SHARE",
        tests=driver("test_queue_gifts", "test_more_is_not_given_until_it_asks_again[redis]"),
    ),
    Mutant(
        name="who refuses a gift gets the next one",
        breaks="who does not look keeps no message from others",
        file=CONSUMER,
        old="        if session.kept:\n",
        new="        if False:\n",
        tests=driver("test_queue_gifts", "test_who_does_not_look_is_given_one_and_no_more[redis]"),
    ),
    Mutant(
        name="what is given overtakes what is urgent",
        breaks="the highest priority comes first",
        file=COMMON,
        old="for p = 0, priorities - 1 do lines",
        new="for p = 0, 0 do lines",
        tests=driver("test_queue_gifts", "test_what_has_a_priority_is_given_and_overtakes_nothing_urgent[redis]"),
    ),
    Mutant(
        name="a cancelled receive keeps what it was given",
        breaks="what comes with a wake is lost with no one",
        file=CONSUMER,
        old="            if self.session is not None and self.session.given:\n",
        new="            if self.session is None:\n",
        tests=driver("test_queue_calls", "test_what_a_cancelled_receive_was_given_goes_to_another[redis]"),
    ),
    Mutant(
        name="a cancelled receive keeps what it took",
        breaks="cancelling receive loses nothing",
        file=CONSUMER,
        old="            session.unsure = True\n            self.mend_soon(session)\n            raise\n        except Unanswered:",
        new="            raise\n        except Unanswered:",
        tests=driver("test_queue_calls", "test_what_a_cancelled_receive_is_handed_goes_to_another[redis]"),
    ),
    Mutant(
        name="a redrive that is sent again forgets what it did",
        breaks="a redrive tells what it has moved",
        file=REDRIVE,
        old="if answer then return answer end\n",
        new="",
        tests=driver("test_browse", "test_a_redrive_whose_answer_was_lost_moves_each_letter_once[redis]"),
    ),
    Mutant(
        name="a redrive copies what is gone",
        breaks="a letter is redriven once",
        file=REDRIVE,
        old="#redis.call('XRANGE', letters, ARGV[i], ARGV[i]) == 1 then",
        new="#redis.call('XRANGE', letters, ARGV[i], ARGV[i]) >= 0 then",
        tests=driver("test_queue_calls", "test_two_redrives_at_once_move_each_letter_once[redis]"),
    ),
    Mutant(
        name="a late purge takes what is new",
        breaks="a copy of a call that comes late spares what has come since",
        file=PURGE,
        old="if answer then return tonumber(answer) end\n",
        new="",
        tests=driver("test_admin", "test_a_purge_whose_answer_was_lost_tells_how_many_all_the_same[redis]"),
    ),
)
