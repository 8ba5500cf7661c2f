-- Return entries of a topic in the order of their times, then partitions, then offsets.
-- flags: allow-oom
-- uses: common topic_base topic_resolve
-- KEYS: 1 the topic
-- ARGV: 1 how many, 2 about how many bytes, 3 partition of the last entry seen or -1, 4 its id, 5 kind of start, then what
--       belongs to it
-- Returns 1 if there may be more, then partition, id and bytes of each; or what is wrong with the start, as topic_start.
local topic, problem = topic_at(KEYS[1], '')
if not topic then return redis.error_reply(problem) end
local limit, room, seen, last = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local at = {}
for i = 6, #ARGV do at[#at + 1] = ARGV[i] end
local places, wrong = resolve(topic, ARGV[5], at)
if not places then return wrong end

-- Ids as numbers; both fit a double for the next thousands of years.
local function parts(id)
  local ms, offset = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(offset)
end
local function before(a, b)
  if a.ms ~= b.ms then return a.ms < b.ms end
  if a.p ~= b.p then return a.p < b.p end
  return a.offset < b.offset
end

local AHEAD = 16
local lines = {}
local function fill(line)
  line.entries = redis.call('XRANGE', KEYS[1] .. ':' .. line.p, line.from, '+', 'COUNT', AHEAD)
  line.next = 1
  if #line.entries > 0 then line.from = '(' .. line.entries[#line.entries][1] end
end
local function advance(line)
  while true do
    if line.next > #line.entries then
      if #line.entries < AHEAD then return false end
      fill(line)
      if #line.entries == 0 then return false end
    end
    line.entry = line.entries[line.next]
    line.next = line.next + 1
    line.ms, line.offset = parts(line.entry[1])
    return true
  end
end

local last_ms = seen >= 0 and parts(last) or 0
for p = 0, topic.partitions - 1 do
  local line = {p = p, from = places[p + 1]}
  if seen >= 0 then
    local ms, offset = parts(line.from)
    if p == seen then
      local last_offset = select(2, parts(last))
      if ms < last_ms or (ms == last_ms and offset <= last_offset) then line.from = '(' .. last end
    elseif p < seen then
      if ms <= last_ms then line.from = text(last_ms + 1) .. '-0' end
    elseif ms < last_ms then
      line.from = text(last_ms) .. '-0'
    end
  end
  fill(line)
  if advance(line) then lines[#lines + 1] = line end
end

local reply = {0}
while #lines > 0 and limit > 0 do
  if room <= 0 then
    reply[1] = 1
    break
  end
  local least = 1
  for i = 2, #lines do
    if before(lines[i], lines[least]) then least = i end
  end
  local line = lines[least]
  local bytes = frame_of(line.entry)
  reply[#reply + 1] = line.p
  reply[#reply + 1] = line.entry[1]
  reply[#reply + 1] = bytes
  limit = limit - 1
  room = room - #bytes
  if not advance(line) then table.remove(lines, least) end
end
return reply
