-- A member's sign of life: it joins, lets partitions go, takes free ones up to its share, or leaves.
-- Everything is decided here: there is no leader, and what a member keeps goes on undisturbed.
-- flags: allow-oom
-- uses: common topic_base
-- KEYS: 1 topic
-- ARGV: 1 group, 2 member, 3 session in ms, 4 '0' a sign of life, '1' to leave, '2' to join, '3' to leave and
--       never come back (a call to join may be on its way still), 5 what it knows to be its own, "p:epoch p:epoch ...",
--       then for each partition it lets go: p, epoch, position to store or ''
-- Returns the ms until another member may be dead (-1: there is no other; -2: it is no member, and nothing was done), how many partitions it has too many, then for each of
-- its own: p, epoch, position, high mark; the last two are '' where it knows the partition.
local E, group, me = KEYS[1], ARGV[1], ARGV[2]
local G, M = E .. ':g:' .. group, E .. ':m:' .. group
local found = redis.call('HMGET', E, 'kind', 'partitions')
if found[1] ~= 't' then return redis.error_reply('BK NOTFOUND the topic is gone') end
if redis.call('EXISTS', G) == 0 then
  redis.call('DEL', M)
  return redis.error_reply('BK NOTFOUND the group is gone')
end
local partitions = tonumber(found[2] or 1)

for _, dead in ipairs(redis.call('ZRANGE', M, '-inf', text(now), 'BYSCORE')) do
  if dead ~= me then  -- whoever calls lives, if nobody has noticed that it was away
    redis.call('ZREM', M, dead)
    redis.call('HDEL', G, 's:' .. dead)
  end
end
local joined, leaves, ended = 0, ARGV[4] == '1' or ARGV[4] == '3', E .. ':z:' .. me
if ARGV[4] == '3' then redis.call('SET', ended, 'ended', 'PX', 3600000) end
if ARGV[4] == '2' and redis.call('EXISTS', ended) == 1 then
  return {-2, 0}
elseif ARGV[4] == '0' and not redis.call('ZSCORE', M, me) then
  return {-2, 0}  -- a call that comes late must not let a member that has left come to life again
elseif leaves then
  redis.call('ZREM', M, me)
  redis.call('HDEL', G, 's:' .. me)
else
  joined = redis.call('ZADD', M, text(now + tonumber(ARGV[3])), me)
end

local letting = {}
for i = 6, #ARGV, 3 do letting[me .. ':' .. ARGV[i + 1] .. '/' .. ARGV[i]] = ARGV[i + 2] end
local members = redis.call('ZRANGE', M, 0, -1)
local count = {}
for _, member in ipairs(members) do count[member] = 0 end
local owners = fetch(G, fields('own', partitions))
local free, freed = {}, 0
for p = 0, partitions - 1 do
  local value = owners[p + 1]
  if value then
    local position = letting[value .. '/' .. p]
    if position and position ~= '' then
      redis.call('HSET', G, 'c' .. p, position)
      redis.call('HDEL', G, 'h' .. p)
    end
    local owner = string.match(value, '^(.*):')
    if position or not count[owner] then
      redis.call('HDEL', G, 'own' .. p)
      owners[p + 1] = false
      freed = freed + 1
    else
      count[owner] = count[owner] + 1
    end
  end
  if not owners[p + 1] then free[#free + 1] = p end
end

local given, surplus, crowded = 0, 0, false
if #members > 0 then
  -- Each gets *least*, and *more* of them one more: those who have most, so that the least moves.
  local least = math.floor(partitions / #members)
  local more = partitions - least * #members
  table.sort(members, function(a, b)
    if count[a] ~= count[b] then return count[a] > count[b] end
    return a < b
  end)
  local rich, mine = 0, 0
  for place, member in ipairs(members) do
    local share = place <= more and least + 1 or least
    if member == me then
      mine = share
    elseif count[member] > least then
      rich = rich + 1
      crowded = crowded or count[member] > share
    end
  end
  if not leaves then
    surplus = math.max(0, count[me] - mine)
    local share = rich < more and least + 1 or least
    local taken = {}
    while count[me] < share and given < #free do
      given = given + 1
      local p = free[given]
      owners[p + 1] = me .. ':' .. text(redis.call('HINCRBY', G, 'e' .. p, 1))
      taken[#taken + 1] = 'own' .. p
      taken[#taken + 1] = owners[p + 1]
      count[me] = count[me] + 1
    end
    keep(G, taken)
  end
end
-- Others look by themselves in time; they are told where this call has left something to take, or somebody with too much.
if (freed > 0 and given < #free and #members > 0) or (crowded and freed + given + joined > 0) then
  redis.pcall('SPUBLISH', E .. ':c', 'g ' .. group)
end

local soonest = -1
for _, member in ipairs(redis.call('ZRANGE', M, 0, 1)) do
  if soonest < 0 and member ~= me then soonest = math.max(0, tonumber(redis.call('ZSCORE', M, member)) - now) end
end
local known = {}
for own in string.gmatch(ARGV[5], '%S+') do known[own] = true end
local reply = {soonest, surplus}
for p = 0, partitions - 1 do
  local epoch = owners[p + 1] and string.match(owners[p + 1], '^(.*):') == me and string.match(owners[p + 1], '%d+$')
  if epoch and not leaves then
    local place = #reply
    reply[place + 1], reply[place + 2], reply[place + 3], reply[place + 4] = p, tonumber(epoch), '', ''
    if not known[p .. ':' .. epoch] then
      local stored = redis.call('HMGET', G, 'c' .. p, 'h' .. p)
      reply[place + 3], reply[place + 4] = stored[1] or '', stored[2] or ''
    end
  end
end
return reply
