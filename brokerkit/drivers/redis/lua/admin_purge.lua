-- Remove all that waits in a queue, or all dead letters, and tell how many that was; once, however often and late it is sent.
-- flags: allow-oom
-- uses: common
-- KEYS: 1 the entity, 2 the answer to this very call, 3 for dead letters: what they are of
-- ARGV: 1 kind
local answer = redis.call('GET', KEYS[2])
if answer then return tonumber(answer) end
local E = KEYS[1]
local found = redis.call('HMGET', E, 'kind', 'priorities')
local count = 0
if not found[1] then
  if not KEYS[3] or redis.call('EXISTS', KEYS[3]) == 0 then return redis.error_reply('BK NOTFOUND') end
elseif found[1] ~= ARGV[1] then
  return redis.error_reply('BK MISMATCH that name is another kind of address')
elseif ARGV[1] == 'd' then
  count = redis.call('XLEN', E .. ':l')
  redis.call('UNLINK', E .. ':l')
else
  local keys = {E .. ':x', E .. ':d', E .. ':y'}  -- with no suspects left, nobody has to make room for one
  count = redis.call('LLEN', keys[1]) + redis.call('ZCARD', keys[2])
  for p = 0, tonumber(found[2] or 1) - 1 do
    keys[#keys + 1] = E .. ':r' .. p
    count = count + redis.call('LLEN', keys[#keys])
  end
  redis.call('UNLINK', unpack(keys))
end
redis.call('SET', KEYS[2], count, 'PX', 3600000)
return count
