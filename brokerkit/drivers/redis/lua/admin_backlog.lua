-- Count what is in a queue, or dead letters.
-- flags: allow-oom
-- uses: common
-- KEYS: 1 the entity, 2 of a queue: its dead letters; of dead letters: what they are of
-- ARGV: 1 kind
-- Returns the server's time in ms, waiting, in flight, delayed, dead, then the first bytes of what may be oldest: of elements
-- of a queue, or of frames of letters.
local FRONT = 26          -- of an element: what a queue knows of it, then its frame up to the time of its first publishing
local LOOKED_AT = 20      -- elements at the head of a list that may all have expired
local SEARCHED = 2000     -- deliveries of one consumer that are searched for the oldest

local E = KEYS[1]
local found = redis.call('HMGET', E, 'kind', 'priorities')
if not found[1] then
  if ARGV[1] ~= 'd' or redis.call('EXISTS', KEYS[2]) == 0 then return redis.error_reply('BK NOTFOUND') end
  return {now, 0, 0, 0, 0}
end
if found[1] ~= ARGV[1] then return redis.error_reply('BK MISMATCH that name is another kind of address') end

if ARGV[1] == 'd' then
  local reply = {now, redis.call('XLEN', E .. ':l'), 0, 0, 0}
  for _, entry in ipairs(redis.call('XRANGE', E .. ':l', '-', '+', 'COUNT', 1)) do
    reply[6] = string.sub(entry[2][2] or '', 1, FRONT - 14)
  end
  return reply
end

local fronts = {}
local function head(elements)
  for _, element in ipairs(elements) do
    if #element >= FRONT then
      local expires = struct.unpack('>I6', element, 9)
      if expires == 0 or expires > now then
        fronts[#fronts + 1] = string.sub(element, 1, FRONT)
        return
      end
    end
  end
end

local waiting, flying = 0, 0
local lists = {E .. ':x'}
for p = 0, tonumber(found[2] or 1) - 1 do lists[#lists + 1] = E .. ':r' .. p end
for _, key in ipairs(lists) do
  local count = redis.call('LLEN', key)
  waiting = waiting + count
  if count > 0 then head(redis.call('LRANGE', key, 0, LOOKED_AT - 1)) end
end
local sessions = redis.call('ZRANGE', E .. ':n', 0, -1, 'WITHSCORES')
for i = 1, #sessions, 2 do
  local key = E .. ':h:' .. sessions[i]
  local count = redis.call('HLEN', key)
  if tonumber(sessions[i + 1]) > now then flying = flying + count else waiting = waiting + count end
  if count > 0 and count <= SEARCHED then
    local oldest, lowest
    for _, field in ipairs(redis.call('HKEYS', key)) do
      local number = #field == 6 and struct.unpack('>I6', field)
      if number and (not lowest or number < lowest) then oldest, lowest = field, number end
    end
    if oldest then fronts[#fronts + 1] = string.sub(redis.call('HGET', key, oldest), 1, FRONT) end
  end
end
local delayed = redis.call('ZCARD', E .. ':d')
if delayed > 0 then head(redis.call('ZRANGE', E .. ':d', 0, LOOKED_AT - 1)) end
return {now, waiting, flying, delayed, redis.call('XLEN', KEYS[2] .. ':l'), unpack(fronts, 1, math.min(#fronts, 500))}
