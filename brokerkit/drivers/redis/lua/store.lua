-- Storing records in queues, topics and dead letters, from any script.
--   open(E, kind, create)  looks an entity up and writes nothing unless it has to be created
--   push(entity, blob)     stores one record
--   finish()               writes what push gathered, wakes consumers and tells readers; once, at the end
local RELATIVE = 2 ^ 47   -- in the place of an expiry: so many milliseconds from now
local LONE = 2            -- ended deliveries from which on a message is handed out alone
local CHUNK = 500         -- values in one command: Lua's unpack has a limit

local opened = {}
local order = {}

local function create_entity(E, kind, settings)
  local fields = {'kind', kind}
  for name, value in string.gmatch(settings, '(%a+)=([^ ]*)') do
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  redis.call('HSET', E, unpack(fields))
end

-- Return the entity, or nil and an error. *create*: the settings of a derived address, '' where it must exist.
local function open(E, kind, create)
  local entity = opened[E]
  if entity then
    if entity.kind == kind then return entity end
    return nil, 'BK MISMATCH that name is another kind of address'
  end
  local found = redis.call('HMGET', E, 'kind', 'priorities', 'dedup', 'partitions', 'retention', 'seq', 'trimmed')
  if not found[1] then
    if create == '' then return nil, 'BK NOTFOUND' end
    create_entity(E, kind, create)
    found = redis.call('HMGET', E, 'kind', 'priorities', 'dedup', 'partitions', 'retention', 'seq', 'trimmed')
  end
  if found[1] ~= kind then return nil, 'BK MISMATCH that name is another kind of address' end
  entity = {
    key = E, kind = kind, seq = tonumber(found[6] or 0), stored = 0, ready = {}, lone = {},
    priorities = tonumber(found[2] or 1), dedup = tonumber(found[3] or 0), parts = {},
    partitions = tonumber(found[4] or 1), retention = tonumber(found[5] or ''), trimmed = tonumber(found[7] or 0),
  }
  opened[E] = entity
  order[#order + 1] = entity
  return entity
end

local function push_queue(q, blob)
  local delay, deliveries, priority, expires = struct.unpack('>I6BBI6', blob)
  q.seq = q.seq + 1
  local element
  if expires >= RELATIVE then
    element = struct.pack('>I6BBI6', q.seq, deliveries, priority, now + expires - RELATIVE) .. string.sub(blob, 15)
  else
    element = struct.pack('>I6', q.seq) .. string.sub(blob, 7)
  end
  if delay > 0 then
    local due = now + delay + 1  -- the time is rounded down, and nothing comes early
    redis.call('ZADD', q.key .. ':d', text(due), element)
    if not q.due or due < q.due then q.due = due end
  else
    q.stored = q.stored + 1
    local line = q.lone
    if deliveries < LONE then
      if priority >= q.priorities then priority = q.priorities - 1 end
      line = q.ready[priority]
      if not line then
        line = {}
        q.ready[priority] = line
      end
    end
    line[#line + 1] = element
  end
  return q.seq
end

local function part_of(t, p)
  local part = t.parts[p]
  if not part then
    local found = redis.call('HMGET', t.key, 'o' .. p, 'm' .. p)
    local ms = tonumber(found[2] or 0)
    part = {first = tonumber(found[1] or 0), ms = ms < now and now or ms, key = t.key .. ':' .. p, number = p}
    part.next = part.first
    t.parts[p] = part
  end
  return part
end

local function push_topic(t, blob)
  local part = part_of(t, struct.unpack('>I4', blob) % t.partitions)
  part.ms = append(part.key, part.ms, part.next, string.sub(blob, 5))
  local id = text(part.ms) .. '-' .. part.next
  part.next = part.next + 1
  part.news = part.next == part.first + 1 and news(id, string.sub(blob, 5)) or ''
  return part
end

local function push(entity, blob)
  if entity.kind == 'q' then return push_queue(entity, blob) end
  if entity.kind == 't' then return push_topic(entity, blob) end
  entity.seq = append(entity.key .. ':l', entity.seq + 1, 0, blob)
  return entity.seq
end

local function push_all(key, values)
  for first = 1, #values, CHUNK do
    redis.call('RPUSH', key, unpack(values, first, math.min(first + CHUNK - 1, #values)))
  end
end

local function finish_queue(q)
  local _, line = next(q.ready)
  if q.stored == 1 and line and give(q.key, line[1], q.priorities) then
    q.stored, q.ready = 0, {}
  end
  for priority, line in pairs(q.ready) do push_all(q.key .. ':r' .. priority, line) end
  if #q.lone > 0 then push_all(q.key .. ':x', q.lone) end
  redis.call('HSET', q.key, 'seq', text(q.seq))
  local count = q.stored
  if q.due then
    -- An idle consumer has to set its timer to an earlier time.
    local head = redis.call('ZRANGE', q.key .. ':d', 0, 0, 'WITHSCORES')
    if tonumber(head[2]) >= q.due then count = count + 1 end
  end
  wake(q.key, count)
end

local function trim(t)
  if not t.retention or now - t.trimmed < 1000 then return end
  local horizon = text(math.max(0, math.floor(now - t.retention * 1000)) + 1)
  for p = 0, t.partitions - 1 do redis.call('XTRIM', t.key .. ':' .. p, 'MINID', '=', horizon) end
  t.trimmed = now
  redis.call('HSET', t.key, 'trimmed', text(now))
end

local function finish_topic(t)
  local fields = {}
  for p, part in pairs(t.parts) do
    fields[#fields + 1] = 'o' .. p
    fields[#fields + 1] = text(part.next)
    fields[#fields + 1] = 'm' .. p
    fields[#fields + 1] = text(part.ms)
  end
  for first = 1, #fields, CHUNK do
    redis.call('HSET', t.key, unpack(fields, first, math.min(first + CHUNK - 1, #fields)))
  end
  trim(t)
  for p, part in pairs(t.parts) do tell(t.key .. ':c:' .. p, part.news) end
end

local function finish()
  for _, entity in ipairs(order) do
    if entity.kind == 'q' then finish_queue(entity)
    elseif entity.kind == 't' then finish_topic(entity)
    else redis.call('HSET', entity.key, 'seq', text(entity.seq)) end
  end
end
