-- What every script begins with: the time, by the server's clock, and how the consumers of a queue are woken.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function text(number)
  return string.format('%.0f', number)
end

-- Somebody else has written into the stream *key*: return the first number of an id that is behind all of them.
local function behind(key)
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return tonumber(string.match(info[i + 1], '^%d+')) + 1 end
  end
end

-- Add an entry to the stream *key* with the id "ms-number"; where somebody else has written into it, go on behind that.
-- Return the ms it has.
local function append(key, ms, number, frame)
  local added = redis.pcall('XADD', key, text(ms) .. '-' .. number, 'f', frame)
  if type(added) ~= 'table' then return ms end
  if not string.find(added.err, 'equal or smaller', 1, true) then error(added) end
  ms = behind(key)
  redis.call('XADD', key, text(ms) .. '-' .. number, 'f', frame)
  return ms
end

-- Tell who listens to *channel*; return how many that were.  Nothing depends on it but speed, and what was stored stays so.
local function tell(channel, message)
  local heard = redis.pcall('SPUBLISH', channel, message)
  return type(heard) == 'number' and heard or 0
end

-- E:w has the idle consumers by the time since when they wait; this much more is added when one is woken, so that the next
-- message wakes another.  Whoever was woken a second ago and did not come may be woken again.  The fraction says how many messages
-- more than one a consumer may be given before it shows itself again.
local WOKEN = 1e15
local SHARE = 4096

-- Let up to *count* idle consumers of queue E look, those who have waited longest first.
local function wake(E, count)
  while count > 0 do
    local idle = redis.call('ZRANGE', E .. ':w', '-inf', '(' .. text(WOKEN + now - 1000), 'BYSCORE', 'LIMIT', 0, text(count))
    if #idle == 0 then return end
    for _, name in ipairs(idle) do
      local process, session = string.match(name, '^(.-)/(.*)$')
      if process and tell(E .. ':c:' .. process, session) > 0 then
        redis.call('ZADD', E .. ':w', 'XX', text(WOKEN + now), name)
        count = count - 1
      else
        redis.call('ZREM', E .. ':w', name)
      end
    end
  end
end

-- Give *element*, which has nobody to wait behind, to an idle consumer of queue E, so that it need not ask; return whether there
-- was one.  It must have shown itself lately: what a process is given that stands still waits for the end of its lease.  A "+"
-- behind its name says that it still counts as idle, behind all others.
local function give(E, element, priorities)
  if #element > 8192 then return false end
  local name, since = unpack(redis.call('ZRANGE', E .. ':w', text(now - 1200), '(' .. text(WOKEN), 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES'))
  if not name then return false end
  local expires = struct.unpack('>I6', element, 9)
  local process, session = string.match(name, '^(.-)/(.*)$')
  if (expires > 0 and expires <= now) or not process then return false end
  if tonumber(redis.call('ZSCORE', E .. ':n', name) or 0) <= now then return false end
  local lines = {E .. ':x'}
  for p = 0, priorities - 1 do lines[p + 2] = E .. ':r' .. p end
  if redis.call('EXISTS', unpack(lines)) > 0 then return false end
  local held, number = E .. ':h:' .. name, string.sub(element, 1, 6)
  local more = math.floor(tonumber(since) % 1 * SHARE)
  redis.call('HSET', held, number, element)
  if more > 0 then
    redis.call('ZADD', E .. ':w', string.format('%.17g', now + (more - 1) / SHARE), name)
  else
    redis.call('ZREM', E .. ':w', name)
  end
  if redis.call('SPUBLISH', E .. ':c:' .. process, session .. (more > 0 and '+ ' or ' ') .. element) > 0 then return true end
  redis.call('HDEL', held, number)
  redis.call('ZREM', E .. ':w', name)
  return false
end

-- Return what readers of a partition are told when one record was added: all of it if it is small, so that they need not ask.
local function news(id, frame)
  return #frame <= 1024 and id .. ' ' .. frame or ''
end
