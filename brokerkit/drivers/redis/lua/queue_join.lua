-- Let a session take part, from now on for a lease.
-- flags: allow-oom
-- uses: common store
-- KEYS: 1 queue
-- ARGV: 1 session, 2 settings to create a derived queue with, or ''
-- Returns the lease in ms.
local E = KEYS[1]
local queue, problem = open(E, 'q', ARGV[2])
if not queue then return redis.error_reply(problem) end
local lease = tonumber(redis.call('HGET', E, 'lease') or 60) * 1000
redis.call('ZADD', E .. ':n', text(now + lease), ARGV[1])
return lease
