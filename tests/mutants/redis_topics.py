"""Mutants of the Redis driver: topics."""

from __future__ import annotations

from .mutant import Mutant, driver

HOME = "brokerkit/drivers/redis/"
CLAIM = HOME + "_topic_claim.py"
COMMIT = HOME + "_topic_commit.py"
CONSUMER = HOME + "_topic.py"
READER = HOME + "_topic_reader.py"
MEMBER = HOME + "_topic_member.py"
BASE = HOME + "lua/topic_base.lua"
READ = HOME + "lua/topic_read.lua"
START = HOME + "lua/topic_start.lua"
SYNC = HOME + "lua/topic_sync.lua"
SETTLE = HOME + "lua/topic_settle.lua"
SEEK = HOME + "lua/topic_seek.lua"

CRASH = driver("test_topic", "test_a_crash_counts_exactly_what_was_handed_out[redis]")
STOOD_STILL = driver("test_topic_faults", "test_who_stood_still_hears_what_it_has_lost_and_takes_part_again[redis]")
LOST_COPIES = driver("test_topic_faults", "test_copies_whose_reply_is_lost_are_stored_once[redis]")
COPIES = driver("test_topic", "test_copies_are_stored_with_the_position_or_not_at_all[redis]")
FENCED = driver("test_topic_calls", "test_a_member_without_the_partition_reads_and_stores_nothing[redis]")
BEGUN = driver("test_topic_calls", "test_where_a_group_begins_is_stored_before_anybody_reads[redis]")
REMOVED = driver("test_topic", "test_a_removed_entry_is_a_position_lost[redis]")

SERVED_TOPICS: tuple[Mutant, ...] = (
    Mutant(
        name="reading leaves no trace",
        breaks="deliveries count crashes",
        file=READ,
        old="marks[#marks + 1] = 'h' .. p",
        new="marks[#marks + 1] = 'x' .. p",
        tests=driver("test_topic_calls", "test_what_a_member_may_have_held_is_known_to_who_follows_it[redis]"),
    ),
    Mutant(
        name="an heir trusts the dead",
        breaks="deliveries count crashes",
        file=CLAIM,
        old="        tracker.crashed()\n",
        new="",
        tests=CRASH,
    ),
    Mutant(
        name="a position without its note",
        breaks="what was done out of order is not done again",
        file=CLAIM,
        old='return f"{ms}-{base} {tracker.encode()}".encode()',
        new='return f"{ms}-{base} ".encode()',
        tests=COPIES,
    ),
    Mutant(
        name="a position covers what is in hand",
        breaks="a message is there until it is settled",
        file=CLAIM,
        old='return f"{ms}-{base} {tracker.encode()}".encode()',
        new='return f"{ms}-{tracker.high} ".encode()',
        tests=CRASH,
    ),
    Mutant(
        name="who lost a partition stores its position",
        breaks="an acknowledgement after the partition moved has no effect",
        file=SETTLE,
        old="  if rights[2 + i] ~= me .. ':' .. ARGV[6 + 3 * i] then\n",
        new="  if not rights[2 + i] then\n",
        tests=FENCED,
    ),
    Mutant(
        name="who lost a partition reads on",
        breaks="a partition has one owner at a time",
        file=READ,
        old="if owned and rights[2 + i] ~= me .. ':' .. ARGV[base + 1] then",
        new="if owned and not rights[2 + i] then",
        tests=FENCED,
    ),
    Mutant(
        name="copies of a topic are stored again",
        breaks="copies and position are stored once, and together",
        file=SETTLE,
        old="if number <= before then",
        new="if number < before then",
        tests=LOST_COPIES,
    ),
    Mutant(
        name="an old position comes late",
        breaks="a call that comes late takes no position back",
        file=READ,
        old="local stores = owned and tonumber(ARGV[3]) >",
        new="local stores = owned and tonumber(ARGV[3]) + 1e9 >",
        tests=driver("test_topic_faults", "test_a_late_position_takes_nothing_back[redis]"),
    ),
    Mutant(
        name="the number of a settlement is not kept",
        breaks="copies and position are stored once, and together",
        file=SETTLE,
        old="  values[#values + 1] = 's:' .. me\n  values[#values + 1] = ARGV[3] .. ' ' .. table.concat(places, ' ', 2)\n",
        new="",
        tests=LOST_COPIES,
    ),
    Mutant(
        name="some copies of a topic are stored",
        breaks="copies and position are both or none",
        file=SETTLE,
        old="if #wrong > 1 then return wrong end\n\nfor _, each in ipairs(pushes) do push(each[1], each[2]) end\nfinish()\n",
        new="for _, each in ipairs(pushes) do push(each[1], each[2]) end\nfinish()\nif #wrong > 1 then return wrong end\n",
        tests=COPIES,
    ),
    Mutant(
        name="done before it is stored",
        breaks="copies and position are both or none",
        file=COMMIT,
        old="                tracker = tracker.copy()\n",
        new="",
        tests=COPIES,
    ),
    Mutant(
        name="the dead keep their partitions",
        breaks="what a dead member had comes to another",
        file=SYNC,
        old="if position or not count[owner] then",
        new="if position then",
        tests=CRASH,
    ),
    Mutant(
        name="a partition is taken from the living",
        breaks="a partition has one owner at a time",
        file=SYNC,
        old="if position or not count[owner] then",
        new="if position or not count[owner] or owner ~= me then",
        tests=driver("test_topic", "test_many_members_share_evenly_and_each_partition_has_one_owner[redis]"),
    ),
    Mutant(
        name="what is let go is not stored",
        breaks="what a member has done is done",
        file=SYNC,
        old="      redis.call('HSET', G, 'c' .. p, position)\n",
        new="",
        tests=driver("test_topic", "test_a_group_is_not_moved_while_a_member_lives_and_then_it_is[redis]"),
    ),
    Mutant(
        name="leaving counts what is handed back",
        breaks="what never began counts no delivery",
        file=CONSUMER,
        old="        self._hand_back(list(self._held.values()))\n",
        new="",
        tests=CRASH,
    ),
    Mutant(
        name="a start is not what was asked for",
        breaks="a group begins where it was told to",
        file=START,
        old="    begin(KEYS[1], ARGV[2], places)\n",
        new="    begin(KEYS[1], ARGV[2], all_from(topic, '-'))\n",
        tests=BEGUN,
    ),
    Mutant(
        name="every start begins anew",
        breaks="the start of a group counts only the first time",
        file=START,
        old="if ARGV[2] == '' or redis.call('EXISTS', G) == 0 then",
        new="if ARGV[2] == '' or redis.call('EXISTS', G) >= 0 then",
        tests=BEGUN,
    ),
    Mutant(
        name="a gap is not told of",
        breaks="what was removed unread is reported",
        file=READER,
        old="        self._overtaken.append(",
        new="        str(",
        tests=REMOVED,
    ),
    Mutant(
        name="what was held is not missed",
        breaks="what was removed unread is reported",
        file=CLAIM,
        old="                self.tracker.done(offset)\n                lost += 1\n",
        new="                self.tracker.done(offset)\n",
        tests=driver(
            "test_topic",
            "test_what_was_held_and_released_is_lost_when_it_is_trimmed_before_another_member_comes[redis]",
        ),
    ),
    Mutant(
        name="what is held too long is handed out",
        breaks="a member that stood still hands out nothing that others have",
        file=READER,
        old="if fetched and not self._doubtful():",
        new="if fetched:",
        tests=driver(
            "test_topic_calls", "test_what_was_read_before_this_process_stood_still_is_not_handed_out_after_it[redis]"
        ),
    ),
    Mutant(
        name="the session counts from the answer",
        breaks="who may have been replaced knows it in time",
        file=MEMBER,
        old="self._proven = sent + self._session",
        new="self._proven = asyncio.get_running_loop().time() + self._session",
        tests=driver("test_topic_calls", "test_ownership_counts_from_when_it_was_asked_for[redis]"),
    ),
    Mutant(
        name="partitions move with what runs",
        breaks="what runs ends before its partition moves",
        file=CONSUMER,
        old="        self._let_go([claim for claim in moving if claim not in busy])\n",
        new="        self._let_go(moving)\n",
        tests=driver("test_topic_faults", "test_a_member_that_lives_is_not_hurried[redis]"),
    ),
    Mutant(
        name="a suspect of a topic is not alone",
        breaks="from its third delivery on a message is alone",
        file=CLAIM,
        old="                if not empty:\n                    return Plan.LATER\n                self.alone = True\n",
        new="                pass\n",
        tests=driver("test_topic", "test_each_crash_counts_until_a_message_comes_alone[redis]"),
    ),
    Mutant(
        name="a group is moved under its members",
        breaks="seek is refused while a member lives",
        file=SEEK,
        old="if live > 0 then return {'live', live} end\n",
        new="",
        tests=driver("test_topic", "test_a_group_is_not_moved_while_a_member_lives_and_then_it_is[redis]"),
    ),
    Mutant(
        name="retention takes a thousand times as much",
        breaks="what is within the retention is there",
        file=BASE,
        old="math.floor(now - kept * 1000)",
        new="math.floor(now - kept)",
        tests=driver("test_topic_calls", "test_retention_removes_what_is_too_old_and_nothing_else[redis]"),
    ),
)
