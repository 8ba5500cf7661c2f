-- Find the messages of a queue with the lowest sequence numbers above one: a part of them in each call, since there may be
-- millions, and lists are only about in their order.
-- flags: allow-oom
-- uses: common
-- KEYS: 1 the queue
-- ARGV: 1 the number, 2 how many messages, 3 only below this number (what was found so far), 4 from which list on, 5 from which
--       element of it on, 6 how many elements to look at, 7 about how many bytes to return
-- Returns the list and the element to go on with (list -1: all were seen), the number below which everything seen is in this
-- reply (-1: no limit), then each message: 1 if it is in flight, its element.
local E = KEYS[1]
local found = redis.call('HMGET', E, 'kind', 'priorities')
if not found[1] then return redis.error_reply('BK NOTFOUND') end
if found[1] ~= 'q' then return redis.error_reply('BK MISMATCH that name is another kind of address') end
local after, limit, below = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local place, at, budget, room = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local CHUNK = 500

local candidates = {}
local function look(element, flying)
  if #element < 14 then return end
  local number = struct.unpack('>I6', element)
  if number <= after or number >= below then return end
  local expires = struct.unpack('>I6', element, 9)
  if flying == 0 and expires > 0 and expires <= now then return end
  candidates[#candidates + 1] = {number, flying, element}
end

local function keep_lowest()
  if #candidates <= limit then return end
  table.sort(candidates, function(a, b) return a[1] < b[1] end)
  for i = #candidates, limit + 1, -1 do candidates[i] = nil end
  below = candidates[limit][1] + 1
end

-- List 0 is all that is in flight, then come those to be handed out alone, each priority, and the delayed ones.
local priorities = tonumber(found[2] or 1)
local delayed = priorities + 2
if place == 0 then
  for _, session in ipairs(redis.call('ZRANGE', E .. ':n', 0, -1)) do
    local values = redis.call('HVALS', E .. ':h:' .. session)
    budget = budget - #values
    for _, element in ipairs(values) do look(element, 1) end
    keep_lowest()
  end
  place = 1
end
while place <= delayed and budget > 0 do
  local last = at + math.min(CHUNK, budget) - 1
  local elements
  if place == delayed then elements = redis.call('ZRANGE', E .. ':d', at, last)
  elseif place == 1 then elements = redis.call('LRANGE', E .. ':x', at, last)
  else elements = redis.call('LRANGE', E .. ':r' .. (place - 2), at, last) end
  for _, element in ipairs(elements) do look(element, 0) end
  keep_lowest()
  budget = budget - #elements
  if #elements < last - at + 1 then place, at = place + 1, 0 else at = last + 1 end
end
if place > delayed then place = -1 end

table.sort(candidates, function(a, b) return a[1] < b[1] end)
local reply = {place, at, -1}
for _, candidate in ipairs(candidates) do
  if room <= 0 then
    reply[3] = candidate[1]
    break
  end
  reply[#reply + 1] = candidate[2]
  reply[#reply + 1] = candidate[3]
  room = room - #candidate[3]
end
return reply
