-- The same as publish for a declared topic, without anything looked up twice.
-- uses: common producer
-- KEYS: 1 topic
-- ARGV: 1 producer, 2 batch number, 3 how many partitions the producer thinks there are, then blobs
-- Returns "partitions p ms first p ms first ...", the first offset of the batch in each partition it touched.
local E, batch, partitions = KEYS[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local lines, touched, names

-- Find out which partitions the blobs are for.
local function spread()
  lines, touched, names = {}, {}, {'kind', ARGV[1], 'partitions', 'retention', 'trimmed'}
  for i = 4, #ARGV do
    local p = struct.unpack('>I4', ARGV[i]) % partitions
    local line = lines[p]
    if line then
      line[#line + 1] = i
    else
      lines[p] = {i}
      touched[#touched + 1] = p
      names[#names + 1] = 'o' .. p
      names[#names + 1] = 'm' .. p
    end
  end
end

local function fetch()
  if #names <= 500 then return redis.call('HMGET', E, unpack(names)) end
  local all = {}
  for first = 1, #names, 500 do
    for i, value in ipairs(redis.call('HMGET', E, unpack(names, first, math.min(first + 499, #names)))) do
      all[first + i - 1] = value
    end
  end
  return all
end

spread()
local found = fetch()
if found[1] ~= 't' then
  return redis.error_reply(found[1] and 'BK MISMATCH that name is another kind of address' or 'BK NOTFOUND')
end
local before = reply_before(found[2], batch)
if before then return before end
if tonumber(found[3]) ~= partitions then
  partitions = tonumber(found[3])
  spread()
  found = fetch()
end

local fields, reply = {}, {text(partitions)}
for n, p in ipairs(touched) do
  local offset, ms = tonumber(found[2 * n + 4] or 0), tonumber(found[2 * n + 5] or 0)
  if ms < now then ms = now end
  local key = E .. ':' .. p
  reply[#reply + 1] = p .. ' ' .. text(ms) .. ' ' .. text(offset)
  for _, i in ipairs(lines[p]) do
    ms = append(key, ms, offset, string.sub(ARGV[i], 5))
    offset = offset + 1
  end
  lines[p].id = text(ms) .. '-' .. offset - 1
  fields[#fields + 1] = 'o' .. p
  fields[#fields + 1] = text(offset)
  fields[#fields + 1] = 'm' .. p
  fields[#fields + 1] = text(ms)
end

local retention = tonumber(found[4] or '')
if retention and now - tonumber(found[5] or 0) >= 1000 then
  local horizon = text(math.max(0, math.floor(now - retention * 1000)) + 1)
  for p = 0, partitions - 1 do redis.call('XTRIM', E .. ':' .. p, 'MINID', '=', horizon) end
  fields[#fields + 1] = 'trimmed'
  fields[#fields + 1] = text(now)
end
reply = table.concat(reply, ' ')
if batch == 1 then forget_producers(E) end
fields[#fields + 1] = ARGV[1]
fields[#fields + 1] = value_of(ARGV[2], reply)
for first = 1, #fields, 500 do
  redis.call('HSET', E, unpack(fields, first, math.min(first + 499, #fields)))
end
for _, p in ipairs(touched) do
  local line = lines[p]
  tell(E .. ':c:' .. p, #line == 1 and news(line.id, string.sub(ARGV[line[1]], 5)) or '')
end
return reply
