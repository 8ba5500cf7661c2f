-- Create an entity if it is missing, and its dead letters: some bytes, without which a full server could not be drained by
-- whoever starts then.
-- flags: allow-oom
-- uses: common store
-- KEYS: 1 the entity, 2 its dead letters if it has them from the beginning
-- ARGV: 1 kind, 2 its settings
local entity, problem = open(KEYS[1], ARGV[1], ARGV[2])
if not entity then return redis.error_reply(problem) end
if KEYS[2] then
  local letters, why = open(KEYS[2], 'd', 'seq=0')
  if not letters then return redis.error_reply(why) end
end
return 'OK'
