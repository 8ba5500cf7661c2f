-- Move the position of a group without members; once, however often and late it is sent.
-- flags: allow-oom
-- uses: common topic_base topic_resolve
-- KEYS: 1 topic, 2 the answer to this very call
-- ARGV: 1 settings to create a derived topic with or '', 2 group, 3 kind of start, then what belongs to it
-- Returns 'ok', 'live' and how many members there are, or as topic_start what is wrong with the position.
if redis.call('EXISTS', KEYS[2]) == 1 then return {'ok'} end
local topic, problem = topic_at(KEYS[1], ARGV[1])
if not topic then return redis.error_reply(problem) end
local G, M = KEYS[1] .. ':g:' .. ARGV[2], KEYS[1] .. ':m:' .. ARGV[2]
local live = redis.call('ZCOUNT', M, '(' .. text(now), '+inf')
if live > 0 then return {'live', live} end
local at = {}
for i = 4, #ARGV do at[#at + 1] = ARGV[i] end
local places, wrong = resolve(topic, ARGV[3], at)
if not places then return wrong end
local gone = {}
for _, letter in ipairs({'own', 'h'}) do
  for _, name in ipairs(fields(letter, topic.partitions)) do gone[#gone + 1] = name end
end
for _, member in ipairs(redis.call('ZRANGE', M, 0, -1)) do gone[#gone + 1] = 's:' .. member end
redis.call('DEL', M)
for first = 1, #gone, MOST do redis.call('HDEL', G, unpack(gone, first, math.min(first + MOST - 1, #gone))) end
begin(KEYS[1], ARGV[2], places)
redis.call('SET', KEYS[2], 'ok', 'PX', 3600000)
return {'ok'}
