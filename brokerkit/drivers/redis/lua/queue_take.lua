-- Hand elements to a session.
-- flags: allow-oom
-- uses: queue_quick common queue_base
-- ARGV: 1 session, 2 how many at most, 3 how many it may be given while it waits where there is none, 0 if it does not wait, 4 '1'
--       if it may be listed as waiting, 5 '1' if it was told to drain, 6 how many it knows to hold (checked if given), 7 how many
--       of these have come alone a lease ago if it holds nothing else, or nothing
-- Returns ms that the session owns what it holds; how many were dropped because they had expired; 0, LONELY, DRAIN or UNKNOWN;
-- ms after which something may be there without a wake, -1 for never; the elements.
local LONELY, DRAIN, UNKNOWN = 1, 2, 3
local NEVER = string.rep('\0', 6)
local ENOUGH = 1048576  -- bytes in one reply, if it is more than one element
local FIRST = 16        -- elements that are looked at before anything is known of their sizes
local name, room, gifts, listed, drains = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4] == '1', ARGV[5] == '1'
local proven = tonumber(ARGV[7] or 0)
local taken = {}
local expired, moved, bytes = 0, 0, 0
local cuts = {}         -- by list: how many elements at its head are done with

-- Somebody else has put *raw* into our list: give it a number, and a frame that says so.
local function adopt(raw)
  local number = redis.call('HINCRBY', E, 'seq', 1)
  local id = 'broken-' .. text(number)
  return struct.pack('>I6BBI6', number, 0, 0, 0) .. struct.pack('>BBHdH', 177, 8, 0, now / 1000, #id) .. id .. '\4' .. raw
end

-- Take up to *count* elements altogether, from the head of *line* on; those that have expired are dropped.
local function take_from(line, count)
  while #taken < count and moved < BATCH + count and bytes < ENOUGH do
    local at, portion = cuts[line] or 0, FIRST
    if #taken > 0 then portion = math.max(1, math.floor((ENOUGH - bytes) * #taken / bytes)) end
    local found = redis.call('LRANGE', line, at, at + math.min(portion, count - #taken) - 1)
    if #found == 0 then return end
    for _, element in ipairs(found) do
      if #taken > 0 and bytes + #element > ENOUGH then return end
      at, moved = at + 1, moved + 1
      cuts[line] = at
      if string.byte(element, 15) ~= 177 then element = adopt(element) end
      local until_ = string.sub(element, 9, 14)
      if until_ ~= NEVER and struct.unpack('>I6', until_) <= now then
        expired = expired + 1
      else
        taken[#taken + 1] = element
        bytes = bytes + #element
      end
    end
  end
end

-- Give what was taken to the session.  Written first, removed last: what is refused on the way loses nothing.
local function hand_over()
  local pairs_ = {}
  for i, element in ipairs(taken) do
    pairs_[2 * i - 1] = string.sub(element, 1, 6)
    pairs_[2 * i] = element
  end
  in_chunks('HSET', E .. ':h:' .. name, pairs_)
  for line, count in pairs(cuts) do redis.call('LTRIM', line, count, -1) end
end

-- Let what is due wait in line.
local function promote()
  local due = redis.call('ZRANGE', E .. ':d', '-inf', text(now), 'BYSCORE', 'LIMIT', 0, BATCH)
  if #due > 0 then
    line_up('RPUSH', due)
    in_chunks('ZREM', E .. ':d', due)
  end
  return #due == BATCH
end

-- Hand back what the sessions held whose deadline has passed.
local function reclaim()
  local budget = BATCH
  local gone = redis.call('ZRANGE', E .. ':n', '-inf', text(now), 'BYSCORE', 'LIMIT', 0, 20, 'WITHSCORES')
  for i = 1, #gone, 2 do
    local count, all = undo(gone[i], tonumber(gone[i + 1]) ~= LEAVING, budget)
    budget = budget - count
    if budget <= 0 or not all then return true end
  end
  return #gone == 40
end

-- Take one of the *suspects*, of which each comes alone, if the session has its hands free but for what it has lived with.
local function take_suspect(suspects)
  if redis.call('HLEN', E .. ':h:' .. name) <= proven then
    take_from(E .. ':x', 1)
    suspects = suspects - (cuts[E .. ':x'] or 0)
    if drains then redis.call('SREM', E .. ':y', name) end
    if suspects == 0 then
      -- Nobody has to drain any more.
      for _, other in ipairs(redis.call('SMEMBERS', E .. ':y')) do
        local process, session = string.match(other, '^(.-)/(.*)$')
        redis.call('SPUBLISH', E .. ':c:' .. process, session)
      end
      redis.call('DEL', E .. ':y')
    else
      wake(E, suspects)
    end
    return #taken > 0 and LONELY or 0
  end
  wake(E, suspects)
  if redis.call('SISMEMBER', E .. ':y', name) == 1 then return DRAIN end
  if redis.call('SCARD', E .. ':y') >= suspects then return 0 end
  redis.call('SADD', E .. ':y', name)
  return DRAIN
end

-- Take up to *count* elements, those of the highest priority first.
local function fill(count)
  for p = priorities - 1, 0, -1 do take_from(E .. ':r' .. p, count) end
end

local function waiting()
  local count = 0
  for p = 0, priorities - 1 do count = count + redis.call('LLEN', E .. ':r' .. p) end
  return count
end

-- Return the ms after which somebody has to look.
local function hint()
  local nearest = -1
  for _, key in ipairs({E .. ':d', E .. ':n'}) do
    local head = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if head[2] and head[1] ~= name then
      local wait = math.max(0, tonumber(head[2]) - now)
      if nearest < 0 or wait < nearest then nearest = wait end
    end
  end
  -- The clock was set back: nobody owns anything for longer than a lease.
  for _, other in ipairs(redis.call('ZRANGE', E .. ':n', '+inf', text(now + lease + 1000), 'BYSCORE', 'REV', 'LIMIT', 0, 10)) do
    redis.call('ZADD', E .. ':n', 'XX', text(now + lease), other)
  end
  return nearest
end

return run(function()
  local deadline = deadline_of(name)
  if not deadline then return redis.error_reply('BK LOST') end
  local owned = deadline - now
  if owned < lease * 0.9 or owned > lease then owned = renew(name) end
  local more = promote()
  more = reclaim() or more

  local state = 0
  local suspects = redis.call('LLEN', E .. ':x')
  if suspects > 0 then
    state = take_suspect(suspects)
  elseif drains then
    redis.call('SREM', E .. ':y', name)
  end
  if state == 0 then
    local others = redis.call('ZCARD', E .. ':w')
    if listed then others = others - 1 end
    if others <= 0 then
      fill(room)
    else
      -- Leave the others their share.
      local ready, before = waiting(), moved
      fill(math.min(room, math.ceil(ready / (others + 1))))
      ready = ready - (moved - before)
      if ready > 0 then wake(E, ready) end
    end
  end
  hand_over()

  if #taken > 0 then
    if listed then redis.call('ZREM', E .. ':w', name) end
    return {owned, expired, state, 0, taken}
  end
  if state == DRAIN then
    if listed then redis.call('ZREM', E .. ':w', name) end
    return {owned, expired, state, -1, taken}
  end
  -- It was given something and has not heard of it, or some answer is missing.
  local known = tonumber(ARGV[6])
  if known and redis.call('HLEN', E .. ':h:' .. name) ~= known then return {owned, expired, UNKNOWN, 0, taken} end
  if more or moved >= BATCH then return {owned, expired, 0, 0, taken} end
  if gifts > 0 then redis.call('ZADD', E .. ':w', string.format('%.17g', now + math.min(gifts - 1, SHARE - 1) / SHARE), name) end
  return {owned, expired, 0, hint(), taken}
end)
