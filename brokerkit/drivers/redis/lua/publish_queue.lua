-- The same as publish for what nearly every batch is: plain records of a declared queue, without anything looked up twice.
-- uses: common producer
-- KEYS: 1 queue, 2 its list of the lowest priority
-- ARGV: 1 producer, 2 batch number, then frames
-- Returns the first sequence number.
local E, batch = KEYS[1], tonumber(ARGV[2])
local found = redis.call('HMGET', E, 'kind', 'seq', ARGV[1], 'priorities')
if found[1] ~= 'q' then
  return redis.error_reply(found[1] and 'BK MISMATCH that name is another kind of address' or 'BK NOTFOUND')
end
local before = reply_before(found[3], batch)
if before then return before end
local seq, count = tonumber(found[2] or 0), #ARGV - 2
local reply = text(seq + 1)
local pack = struct.pack
local given = false
if count == 1 then
  local element = pack('>I6I8', seq + 1, 0) .. ARGV[3]
  given = give(E, element, tonumber(found[4] or 1))
  if not given then redis.call('RPUSH', KEYS[2], element) end
else
  for first = 3, #ARGV, 500 do
    local last = math.min(first + 499, #ARGV)
    local elements = {}
    for i = first, last do elements[i - first + 1] = pack('>I6I8', seq + i - 2, 0) .. ARGV[i] end
    redis.call('RPUSH', KEYS[2], unpack(elements))
  end
end
if batch == 1 then forget_producers(E) end
redis.call('HSET', E, 'seq', text(seq + count), ARGV[1], value_of(ARGV[2], reply))
if not given then wake(E, count) end
return reply
