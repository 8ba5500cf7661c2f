-- Note that a record which its owner was told of, instead of reading it, is handed out.
-- flags: allow-oom
-- KEYS: 1 topic
-- ARGV: 1 group, 2 member, 3 partition, 4 epoch, 5 offset behind the record
-- Returns 1, or 0 where the partition belongs to somebody else.
local G = KEYS[1] .. ':g:' .. ARGV[1]
local found = redis.call('HMGET', G, 'own' .. ARGV[3], 'h' .. ARGV[3])
if found[1] ~= ARGV[2] .. ':' .. ARGV[4] then return 0 end
if tonumber(found[2] or 0) < tonumber(ARGV[5]) then redis.call('HSET', G, 'h' .. ARGV[3], ARGV[5]) end
return 1
