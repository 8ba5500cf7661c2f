-- Store a batch of one producer in one entity, once, however often it is sent: any batch, those with ids (dedup), delays,
-- times to live or priorities, and those for derived addresses.
-- uses: common producer store
-- KEYS: 1 entity
-- ARGV: 1 producer, 2 batch number, 3 kind, 4 settings to create a derived entity with or '', 5 '1' if each blob is followed by
--       its id, then the blobs
-- Returns for queues the sequence numbers: the first of a run, or one each with 0 for a duplicate where there are ids;
-- for topics "partitions p ms first p ms first ...", the first offset of the batch in each partition it touched.
local batch = tonumber(ARGV[2])
local before = reply_before(redis.call('HGET', KEYS[1], ARGV[1]), batch)
if before then return before end
local entity, problem = open(KEYS[1], ARGV[3], ARGV[4])
if not entity then return redis.error_reply(problem) end

local reply
if ARGV[5] == '1' then
  local ids, numbers = KEYS[1] .. ':u', {}
  local over = redis.call('ZRANGE', ids, '-inf', text(now), 'BYSCORE', 'LIMIT', 0, 50 + #ARGV)
  for first = 1, #over, 500 do redis.call('ZREM', ids, unpack(over, first, math.min(first + 499, #over))) end
  for i = 6, #ARGV, 2 do
    local number = 0
    local known = entity.dedup > 0 and redis.call('ZSCORE', ids, ARGV[i + 1])
    if not known or tonumber(known) <= now then
      if entity.dedup > 0 then redis.call('ZADD', ids, text(now + entity.dedup * 1000), ARGV[i + 1]) end
      number = push(entity, ARGV[i])
    end
    numbers[#numbers + 1] = text(number)
  end
  reply = table.concat(numbers, ' ')
elseif entity.kind == 't' then
  for i = 6, #ARGV do push(entity, ARGV[i]) end
  local runs = {text(entity.partitions)}
  for p, part in pairs(entity.parts) do
    runs[#runs + 1] = p .. ' ' .. text(part.ms) .. ' ' .. text(part.first)
  end
  reply = table.concat(runs, ' ')
else
  reply = text(entity.seq + 1)
  for i = 6, #ARGV do push(entity, ARGV[i]) end
end
finish()
if batch == 1 then forget_producers(KEYS[1]) end
redis.call('HSET', KEYS[1], ARGV[1], value_of(ARGV[2], reply))
return reply
