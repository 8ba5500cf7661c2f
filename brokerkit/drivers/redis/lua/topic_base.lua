-- What the scripts of topics share.
local MAGIC = 0xB1
local MOST = 500          -- values in one command: Lua's unpack has a limit

-- Return the values of the fields *names* of the hash *key*, false where there is none.
local function fetch(key, names)
  if #names <= MOST then return redis.call('HMGET', key, unpack(names)) end
  local found = {}
  for first = 1, #names, MOST do
    local part = redis.call('HMGET', key, unpack(names, first, math.min(first + MOST - 1, #names)))
    for i = 1, #part do found[first + i - 1] = part[i] end
  end
  return found
end

-- Store field, value, field, value, ... in the hash *key*.
local function keep(key, pairs_)
  for first = 1, #pairs_, MOST do
    redis.call('HSET', key, unpack(pairs_, first, math.min(first + MOST - 1, #pairs_)))
  end
end

-- Return the fields *letter*0, *letter*1, ... of all partitions.
local function fields(letter, partitions)
  local names = {}
  for p = 0, partitions - 1 do names[p + 1] = letter .. p end
  return names
end

-- Remove what is too old from all streams of the topic *E*, at most once a second.
local function expire(E, partitions, retention, trimmed)
  local kept = tonumber(retention or '')
  if not kept or now - tonumber(trimmed or 0) < 1000 then return end
  local horizon = text(math.max(0, math.floor(now - kept * 1000)) + 1)
  for p = 0, partitions - 1 do redis.call('XTRIM', E .. ':' .. p, 'MINID', '=', horizon) end
  redis.call('HSET', E, 'trimmed', text(now))
end

local function offset_of(id)
  return tonumber(string.match(id, '%-(%d+)$'))
end

-- Return the bytes of an entry, and whether they are a frame of ours.
local function frame_of(entry)
  local values = entry[2]
  if #values == 2 and values[1] == 'f' then return values[2], string.byte(values[2]) == MAGIC end
  return table.concat(values, ' '), false
end
