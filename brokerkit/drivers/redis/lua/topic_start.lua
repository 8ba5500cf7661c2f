-- Find out where reading begins, and store it for a group that is new.
-- flags: allow-oom
-- uses: common topic_base topic_resolve
-- KEYS: 1 topic
-- ARGV: 1 settings to create a derived topic with or '', 2 group or '', 3 kind of start, then what belongs to it
-- Returns 'ok', the end of each partition, where reading begins in each (nothing for a group that has a position);
-- or 'none', 'later', 'lost' and how many: the position cannot be had.
local topic, problem = topic_at(KEYS[1], ARGV[1])
if not topic then return redis.error_reply(problem) end
local at = {}
for i = 4, #ARGV do at[#at + 1] = ARGV[i] end
local G = KEYS[1] .. ':g:' .. ARGV[2]
local places = {}
if ARGV[2] == '' or redis.call('EXISTS', G) == 0 then
  local wrong
  places, wrong = resolve(topic, ARGV[3], at)
  if not places then return wrong end
  if ARGV[2] ~= '' then
    begin(KEYS[1], ARGV[2], places)
    places = {}
  end
end
return {'ok', topic.next, places}
