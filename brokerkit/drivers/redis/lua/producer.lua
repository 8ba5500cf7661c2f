-- The last batch of each producer, kept in the entity's own hash: the field is the producer, its value "batch seconds reply".
-- What is sent a second time finds its reply there and is not stored again.
local KEPT = 3600      -- seconds after which a producer that has stored nothing is forgotten, when there are many
local MANY = 512
local LOOK = 50

-- Return the reply to *batch* if it was stored before, as *last*, the field's value, says.
local function reply_before(last, batch)
  if not last then return nil end
  local number, reply = string.match(last, '^(%d+) %d+ (.*)$')
  number = tonumber(number)
  if number == batch then return reply end
  if number > batch then return redis.error_reply('BK STALE a later batch of this producer is stored') end
end

local function value_of(batch, reply)
  return batch .. ' ' .. clock[1] .. ' ' .. reply
end

-- A new producer: look at some of the others, whoever they are, and forget those that are gone.
local function forget_producers(E)
  if redis.call('HLEN', E) < MANY then return end
  local fields, gone = redis.call('HRANDFIELD', E, LOOK, 'WITHVALUES'), {}
  for i = 1, #fields, 2 do
    if string.byte(fields[i]) == 64 then
      local seconds = tonumber(string.match(fields[i + 1], '^%d+ (%d+)'))
      if not seconds or seconds < clock[1] - KEPT then gone[#gone + 1] = fields[i] end
    end
  end
  if #gone > 0 then redis.call('HDEL', E, unpack(gone)) end
end
