-- A session keeps what it was given without asking for it.
-- flags: allow-oom
-- KEYS: 1 queue
-- ARGV: 1 session, 2 number (6 bytes)
-- Returns 1, or 0 if it came too late: others have it.
return redis.call('ZREM', KEYS[1] .. ':g', ARGV[1] .. ' ' .. ARGV[2])
