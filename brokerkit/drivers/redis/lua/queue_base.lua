-- What the scripts of a queue's consumers share.  KEYS: 1 the queue.
local E = KEYS[1]
local LONE = 2             -- ended deliveries from which on a message is handed out alone
local CHUNK = 500          -- values in one command: Lua's unpack has a limit
local BATCH = 500          -- elements that one call moves besides those that it hands out
local DEAD, LEAVING = 0, 1 -- in the place of a session's deadline: it is gone, what it held is being handed back
local priorities, lease    -- known once `main` runs

-- Run *main* for the queue, and name the key if one of another type is in the way.
local function run(main)
  local ok, reply = pcall(function()
    local found = redis.call('HMGET', E, 'kind', 'priorities', 'lease')
    if not found[1] then return redis.error_reply('BK NOTFOUND') end
    if found[1] ~= 'q' then return redis.error_reply('BK MISMATCH that name is another kind of address') end
    priorities, lease = tonumber(found[2] or 1), tonumber(found[3] or 60) * 1000
    return main()
  end)
  if ok then return reply end
  local problem = type(reply) == 'table' and reply.err or tostring(reply)
  if not string.find(problem, 'WRONGTYPE', 1, true) then return redis.error_reply(problem) end
  local types = {[E] = 'hash', [E .. ':x'] = 'list', [E .. ':d'] = 'zset', [E .. ':n'] = 'zset', [E .. ':w'] = 'zset', [E .. ':y'] = 'set'}
  for p = 0, (priorities or 1) - 1 do types[E .. ':r' .. p] = 'list' end
  for key, wanted in pairs(types) do
    local is = redis.call('TYPE', key).ok
    if is ~= 'none' and is ~= wanted then
      return redis.error_reply('BK BROKEN the key ' .. key .. ' holds a ' .. is .. ', and brokerkit keeps a ' .. wanted .. ' there; remove it')
    end
  end
  return redis.error_reply(problem)
end

-- Call *command* on *key* with all *values*, in as many steps as it takes.
local function in_chunks(command, key, values)
  for first = 1, #values, CHUNK do
    redis.call(command, key, unpack(values, first, math.min(first + CHUNK - 1, #values)))
  end
end

-- Return the list in which *element* waits.
local function line_of(element)
  local deliveries, priority = string.byte(element, 7, 8)
  if not priority then return E .. ':r0' end
  if deliveries >= LONE then return E .. ':x' end
  if priority >= priorities then priority = priorities - 1 end
  return E .. ':r' .. priority
end

-- Let *elements* wait: behind all others ('RPUSH') or before them ('LPUSH'), in their order.
local function line_up(command, elements)
  local lines = {}
  local first, last, step = 1, #elements, 1
  if command == 'LPUSH' then first, last, step = #elements, 1, -1 end
  for i = first, last, step do
    local key = line_of(elements[i])
    local line = lines[key]
    if not line then
      line = {}
      lines[key] = line
    end
    line[#line + 1] = elements[i]
  end
  for key, line in pairs(lines) do in_chunks(command, key, line) end
end

-- Let *elements*, which were in hand, wait first in line, those that came first in front.
local function hand_back(elements)
  local numbers = {}
  for _, element in ipairs(elements) do numbers[element] = struct.unpack('>I6', element) end
  table.sort(elements, function(a, b) return numbers[a] < numbers[b] end)
  line_up('LPUSH', elements)
end

local function one_more(element)
  return string.sub(element, 1, 6) .. string.char(math.min(string.byte(element, 7) + 1, 255)) .. string.sub(element, 8)
end

-- Hand back up to about *budget* elements of a session that is gone, and forget it with the last one; *counted* if an ownership
-- ended by it.  Return how many, and whether that was all.
local function undo(name, counted, budget)
  local key, cursor = E .. ':h:' .. name, '0'
  local fields, elements, seen = {}, {}, {}
  repeat
    local page = redis.call('HSCAN', key, cursor, 'COUNT', budget)
    cursor = page[1]
    for i = 1, #page[2], 2 do
      local field, element = page[2][i], page[2][i + 1]
      if not seen[field] then
        seen[field] = true
        fields[#fields + 1] = field
        elements[#elements + 1] = counted and one_more(element) or element
      end
    end
  until cursor == '0' or #fields > 0
  if #fields > 0 then
    hand_back(elements)
    in_chunks('HDEL', key, fields)
  end
  if cursor == '0' then
    redis.call('ZREM', E .. ':n', name)
    redis.call('ZREM', E .. ':w', name)
    redis.call('SREM', E .. ':y', name)
  else
    redis.call('ZADD', E .. ':n', 'XX', counted and DEAD or LEAVING, name)
  end
  return #fields, cursor == '0'
end

-- Return the deadline of a session that lives, else nil.
local function deadline_of(name)
  local deadline = tonumber(redis.call('ZSCORE', E .. ':n', name) or 0)
  return deadline > LEAVING and deadline or nil
end

-- Let the session own what it holds for a lease from now on.
local function renew(name)
  redis.call('ZADD', E .. ':n', text(now + lease), name)
  return lease
end
