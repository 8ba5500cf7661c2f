-- Where reading a topic begins.
--   resolve(topic, kind, at)  returns a list of "ms-offset", one for each partition: the first record there has this offset and
--                             no earlier time; or nil and what is wrong, as a reply

-- Look a topic up; *create*: the settings of a derived one that is created here, '' for others.
local function topic_at(E, create)
  local found = redis.call('HMGET', E, 'kind', 'partitions', 'retention', 'trimmed')
  if not found[1] and create ~= '' then
    local values = {'kind', 't'}
    for name, value in string.gmatch(create, '(%a+)=([^ ]*)') do
      values[#values + 1] = name
      values[#values + 1] = value
    end
    redis.call('HSET', E, unpack(values))
    redis.call('SADD', string.match(E, '^bk:{[^}]*}') .. ':e', E)
    found = redis.call('HMGET', E, 'kind', 'partitions', 'retention', 'trimmed')
  end
  if not found[1] then return nil, 'BK NOTFOUND' end
  if found[1] ~= 't' then return nil, 'BK MISMATCH that name is another kind of address' end
  local topic = {key = E, partitions = tonumber(found[2] or 1)}
  expire(E, topic.partitions, found[3], found[4])
  topic.next = fetch(E, fields('o', topic.partitions))
  topic.last = fetch(E, fields('m', topic.partitions))
  for p = 1, topic.partitions do
    topic.next[p] = tonumber(topic.next[p] or 0)
    topic.last[p] = topic.last[p] or '0'
  end
  return topic
end

-- Return the id of the first record of ours from *from* on in partition *p*, or where the next one will be.
local function first_from(topic, p, from)
  while true do
    local entries = redis.call('XRANGE', topic.key .. ':' .. p, from, '+', 'COUNT', 8)
    if #entries == 0 then return topic.last[p + 1] .. '-' .. text(topic.next[p + 1]) end
    for _, entry in ipairs(entries) do
      local _, ours = frame_of(entry)
      if ours and offset_of(entry[1]) < topic.next[p + 1] then return entry[1] end
    end
    from = '(' .. entries[#entries][1]
  end
end

local function all_from(topic, from)
  local places = {}
  for p = 0, topic.partitions - 1 do places[p + 1] = first_from(topic, p, from) end
  return places
end

local function resolve_position(topic, p, id)
  if p >= topic.partitions then return nil, {'none'} end
  local offset = offset_of(id)
  if offset >= topic.next[p + 1] then return nil, {'later'} end
  if #redis.call('XRANGE', topic.key .. ':' .. p, id, id) == 0 then
    local first = offset_of(first_from(topic, p, '-'))
    if first > offset then return nil, {'lost', first - offset} end
    return nil, {'none'}
  end
  local places = all_from(topic, string.match(id, '^%d+') .. '-0')
  places[p + 1] = id
  return places
end

local function resolve_cursor(topic, at)
  if #at ~= topic.partitions then return nil, {'none'} end
  local lost = 0
  for p = 0, topic.partitions - 1 do
    local offset = offset_of(at[p + 1])
    if offset > topic.next[p + 1] then return nil, {'lost'} end
    local first = offset_of(first_from(topic, p, at[p + 1]))
    if first > offset then lost = lost + first - offset end
  end
  if lost > 0 then return nil, {'lost', lost} end
  return at
end

local function resolve(topic, kind, at)
  if kind == 'earliest' then return all_from(topic, '-') end
  if kind == 'time' then return all_from(topic, at[1] .. '-0') end
  if kind == 'position' then return resolve_position(topic, tonumber(at[1]), at[2]) end
  if kind == 'cursor' then return resolve_cursor(topic, at) end
  local places = {}
  for p = 1, topic.partitions do places[p] = topic.last[p] .. '-' .. text(topic.next[p]) end
  return places
end

-- Store where a group begins.
local function begin(E, group, places)
  local values = {}
  for p = 1, #places do
    values[#values + 1] = 'c' .. (p - 1)
    values[#values + 1] = places[p] .. ' '
  end
  keep(E .. ':g:' .. group, values)
  redis.call('SADD', E .. ':gs', group)
end
