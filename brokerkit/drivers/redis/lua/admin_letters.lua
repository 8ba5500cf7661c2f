-- Return dead letters, the oldest first: those from an id on, or those with the ids that are asked for.
-- flags: allow-oom
-- uses: common
-- KEYS: 1 the dead letters, 2 what they are of
-- ARGV: 1 'after' or 'these', 2 about how many bytes; then the id as XRANGE takes it and how many, or the ids
-- Returns 1 if there may be more, then id and bytes of each; those that are gone are left out.
local E = KEYS[1]
local kind = redis.call('HGET', E, 'kind')
if not kind then
  if redis.call('EXISTS', KEYS[2]) == 0 then return redis.error_reply('BK NOTFOUND') end
  return {0}
end
if kind ~= 'd' then return redis.error_reply('BK MISMATCH that name is another kind of address') end
local reply, room = {0}, tonumber(ARGV[2])
local function add(entry)
  local values = entry[2]
  local bytes = #values == 2 and values[1] == 'f' and values[2] or table.concat(values, ' ')
  reply[#reply + 1] = entry[1]
  reply[#reply + 1] = bytes
  room = room - #bytes
end

if ARGV[1] == 'after' then
  local from, left = ARGV[3], tonumber(ARGV[4])
  while left > 0 do
    local wanted = math.min(left, 10)
    local entries = redis.call('XRANGE', E .. ':l', from, '+', 'COUNT', wanted)
    for _, entry in ipairs(entries) do add(entry) end
    left = left - #entries
    if #entries < wanted then break end
    from = '(' .. entries[#entries][1]
    if room <= 0 then
      reply[1] = 1
      break
    end
  end
  return reply
end
for i = 3, #ARGV do
  if room <= 0 then
    reply[1] = 1
    break
  end
  local entries = redis.call('XRANGE', E .. ':l', ARGV[i], ARGV[i])
  if #entries > 0 then add(entries[1]) end
end
return reply
