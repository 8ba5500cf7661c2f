-- Forget what a session has done.
-- flags: allow-oom
-- KEYS: 1 queue
-- ARGV: 1 session, then numbers (6 bytes each) of what it holds
-- Returns 1, or 0 if the session is gone.  What is missing in one that lives was settled before.
local held, gone = KEYS[1] .. ':h:' .. ARGV[1], 0
for first = 2, #ARGV, 500 do
  gone = gone + redis.call('HDEL', held, unpack(ARGV, first, math.min(first + 499, #ARGV)))
end
if gone == #ARGV - 1 then return 1 end
return tonumber(redis.call('ZSCORE', KEYS[1] .. ':n', ARGV[1]) or 0) > 1 and 1 or 0
