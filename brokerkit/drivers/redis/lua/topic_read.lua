-- Read partitions that somebody owns, all in one call.
-- What is handed out is noted before the reply leaves, so that a crash leaves a trace of what the reader may have held.
-- flags: allow-oom
-- uses: common topic_base
-- KEYS: 1 topic
-- ARGV: 1 group or '', 2 member, 3 number of this call among those that store positions, 4 most records,
--       then for each partition: p, epoch, next offset, id to read from, most records, offsets wanted "n n ..." instead of what
--       comes next or '', position to store or ''
-- Returns for each partition where there is something to tell: its place in the arguments (from 0), what happened, the end of
-- the partition, the id of the last entry looked at, ids of entries that are not ours, then id, frame, id, frame, ...
-- What happened: 'lost' (somebody else owns it), 'skip' (there was no room for it), 'run' (offsets without a gap), 'any' (look
-- at the offsets), 'more' (not all that is wanted was looked for: ask again from the last id on), 'anew' (the topic was deleted
-- and made again).
local ENOUGH = 1048576   -- bytes after which no more records are looked at
local FIRST, STEP = 4, 100
local EACH = 7
local E, group, me = KEYS[1], ARGV[1], ARGV[2]
local G = E .. ':g:' .. group
local owned = group ~= ''
local room = tonumber(ARGV[4])
local claims = (#ARGV - 4) / EACH

local names = {'kind', 'partitions', 'retention', 'trimmed'}
local rights = {'s:' .. me}
for i = 0, claims - 1 do
  names[5 + i] = 'o' .. ARGV[5 + i * EACH]
  rights[2 + i] = 'own' .. ARGV[5 + i * EACH]
end
local topic = fetch(E, names)
if topic[1] ~= 't' then return redis.error_reply('BK NOTFOUND the topic is gone') end
expire(E, tonumber(topic[2] or 1), topic[3], topic[4])
if owned then rights = fetch(G, rights) end
local stores = owned and tonumber(ARGV[3]) > tonumber(string.match(rights[1] or '0', '^%d+'))

local size = 0
local marks = {}

-- Return how many entries to look at next, when *count* of them had *bytes*: no more than fit into what is left.
local function some(count, bytes, left)
  if count == 0 then return FIRST end
  return math.max(1, math.min(STEP, math.floor(left * count / math.max(bytes, 1))))
end

-- Append the *wanted* records of a partition, which may be anywhere behind *from*; return whether all were looked for.
local function pick(row, key, from, wanted)
  local missing, last = 0, 0
  local want = {}
  for number in string.gmatch(wanted, '%d+') do
    last = tonumber(number)
    want[last] = true
    missing = missing + 1
  end
  local seen, copied = 0, 0
  while missing > 0 do
    if copied >= ENOUGH then return false end
    local entries = redis.call('XRANGE', key, from, '+', 'COUNT', some(seen, copied, ENOUGH - copied))
    if #entries == 0 then return true end
    for _, entry in ipairs(entries) do
      local offset = offset_of(entry[1])
      local frame, ours = frame_of(entry)
      seen = seen + 1
      copied = copied + #frame
      if want[offset] then
        want[offset] = nil
        missing = missing - 1
        row[#row + 1] = entry[1]
        row[#row + 1] = frame
      end
      if ours and offset >= last then return true end
    end
    row[4] = entries[#entries][1]
    from = '(' .. row[4]
  end
  return true
end

-- Return whether *entry*, which is no frame of ours, stands where one of ours has been.
local function damaged(key, entry, offset)
  for _, following in ipairs(redis.call('XRANGE', key, '(' .. entry[1], '+', 'COUNT', STEP)) do
    local _, ours = frame_of(following)
    if ours then return offset_of(following[1]) > offset end
  end
  return true
end

-- Append what comes next in a partition; return the offset behind it.
local function follow(row, key, from, offset, finish, most)
  local strict = string.sub(from, 1, 1) == '('
  local count, seen, before = 0, 0, size
  while count < most do
    if size >= ENOUGH then
      if count == 0 then row[2] = 'more' end
      return offset
    end
    local ask = math.min(most - count, some(seen, size - before, ENOUGH - size))
    local entries = redis.call('XRANGE', key, from, '+', 'COUNT', ask)
    local n = #entries
    if n == 0 then break end
    row[4] = entries[n][1]
    from = '(' .. row[4]
    seen = seen + n
    local plain = offset_of(entries[1][1]) == offset and offset_of(row[4]) == offset + n - 1
    local at, sized = #row, size
    if plain then
      for i = 1, n do
        local frame, ours = frame_of(entries[i])
        if not ours then
          plain = false
          break
        end
        row[at + 2 * i - 1] = entries[i][1]
        row[at + 2 * i] = frame
        size = size + #frame
      end
    end
    if plain then
      strict = true
      offset = offset + n
      count = count + n
    else
      for i = #row, at + 1, -1 do row[i] = nil end
      row[2], size = 'any', sized
      for i = 1, n do
        local entry = entries[i]
        local found = offset_of(entry[1])
        local frame, ours = frame_of(entry)
        size = size + #frame
        if ours and found < offset then
          if strict then
            row[2] = 'anew'
            return offset
          end
        elseif found < finish and found >= offset and (ours or (found == offset and damaged(key, entry, found))) then
          row[#row + 1] = entry[1]
          row[#row + 1] = frame
          strict = true
          offset = found + 1
          count = count + 1
        else
          row[5][#row[5] + 1] = entry[1]
        end
      end
    end
    if n < ask then break end
  end
  return offset
end

local reply = {}
for i = 0, claims - 1 do
  local base = 5 + i * EACH
  local p, offset, from, most = ARGV[base], tonumber(ARGV[base + 2]), ARGV[base + 3], tonumber(ARGV[base + 4])
  local wanted, position = ARGV[base + 5], ARGV[base + 6]
  local key = E .. ':' .. p
  local finish = tonumber(topic[5 + i] or 0)
  if owned and rights[2 + i] ~= me .. ':' .. ARGV[base + 1] then
    reply[#reply + 1] = {i, 'lost', finish}
  else
    if position ~= '' and stores then
      marks[#marks + 1] = 'c' .. p
      marks[#marks + 1] = position
    end
    if wanted ~= '' then
      local row = {i, 'any', finish, '', {}}
      if not pick(row, key, from, wanted) then row[2] = 'more' end
      reply[#reply + 1] = row
    elseif finish < offset then
      reply[#reply + 1] = {i, 'anew', finish}
    elseif finish > offset then
      local row = {i, 'run', finish, '', {}}
      most = math.min(most, room)
      if most <= 0 or size >= ENOUGH then
        row[2] = 'skip'
      else
        local behind = follow(row, key, from, offset, finish, most)
        if row[2] == 'run' and #row == 5 then row[2] = 'any' end
        if owned and behind > tonumber(redis.call('HGET', G, 'h' .. p) or offset) then
          marks[#marks + 1] = 'h' .. p
          marks[#marks + 1] = text(behind)
        end
        room = room - (#row - 5) / 2
      end
      reply[#reply + 1] = row
    end
  end
end
if #marks > 0 then
  if stores then
    marks[#marks + 1] = 's:' .. me
    marks[#marks + 1] = ARGV[3]
  end
  keep(G, marks)
end
return reply
