-- Store copies of what a session holds, and forget the originals.
-- flags: allow-oom
-- uses: common store
-- KEYS: 1 queue, then the entities that copies go to
-- ARGV: 1 session, kind and settings (for `open`) of each entity, then for each item its number (6 bytes), how many copies, and
--       for each of them the index of its entity and its blob
-- Returns 1, or 0 if the session is gone and nothing was done; then for each item 1, 0 if it was settled before, or why not.
local E = KEYS[1]
local held = E .. ':h:' .. ARGV[1]
if tonumber(redis.call('ZSCORE', E .. ':n', ARGV[1]) or 0) <= 1 then return {0} end
local at, results, done = 2 * #KEYS, {1}, {}
while at <= #ARGV do
  local number, copies, problem = ARGV[at], tonumber(ARGV[at + 1]), nil
  local entities = {}
  if done[number] or redis.call('HEXISTS', held, number) == 0 then
    results[#results + 1] = 0
  else
    for i = 1, copies do
      local index = tonumber(ARGV[at + 2 * i])
      local entity
      entity, problem = open(KEYS[index], ARGV[2 * index - 2], ARGV[2 * index - 1])
      if not entity then break end
      entities[i] = entity
    end
    if problem then
      results[#results + 1] = problem
    else
      for i = 1, copies do push(entities[i], ARGV[at + 2 * i + 1]) end
      done[number] = true
      done[#done + 1] = number
      results[#results + 1] = 1
    end
  end
  at = at + 2 + 2 * copies
end
-- The originals go last: if anything before has failed, they are still there.
finish()
for first = 1, #done, 500 do redis.call('HDEL', held, unpack(done, first, math.min(first + 499, #done))) end
return results
