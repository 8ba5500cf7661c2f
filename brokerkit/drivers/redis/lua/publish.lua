-- Store a batch of one producer in one entity, once, however often it is sent.
-- uses: common store
-- KEYS: 1 entity, 2 the producer's last batch
-- ARGV: 1 kind, 2 batch number, 3 settings to create a derived entity with or '', 4 '1' if each blob is followed by its id
--       (dedup), then the blobs
-- Returns for queues the sequence numbers: the first of a run, or one each with 0 for a duplicate where there are ids;
-- for topics "partitions p ms first p ms first ...", the first offset of the batch in each partition it touched.
local last = redis.call('GET', KEYS[2])
if last then
  local batch, reply = string.match(last, '^(%d+) (.*)$')
  if batch == ARGV[2] then return reply end
end
local entity, problem = open(KEYS[1], ARGV[1], ARGV[3])
if not entity then return redis.error_reply(problem) end

local reply
if ARGV[4] == '1' then
  local ids, numbers = KEYS[1] .. ':u', {}
  redis.call('ZREMRANGEBYSCORE', ids, '-inf', now)
  for i = 5, #ARGV, 2 do
    local number = 0
    if entity.dedup <= 0 or redis.call('ZADD', ids, 'NX', text(now + entity.dedup * 1000), ARGV[i + 1]) == 1 then
      number = push(entity, ARGV[i])
    end
    numbers[#numbers + 1] = text(number)
  end
  reply = table.concat(numbers, ' ')
elseif entity.kind == 't' then
  for i = 5, #ARGV do push(entity, ARGV[i]) end
  local runs = {text(entity.partitions)}
  for p, part in pairs(entity.parts) do
    runs[#runs + 1] = p .. ' ' .. text(part.ms) .. ' ' .. text(part.first)
  end
  reply = table.concat(runs, ' ')
else
  reply = text(entity.seq + 1)
  for i = 5, #ARGV do push(entity, ARGV[i]) end
end
finish()
redis.call('SET', KEYS[2], ARGV[2] .. ' ' .. reply, 'PX', 3600000)
return reply
