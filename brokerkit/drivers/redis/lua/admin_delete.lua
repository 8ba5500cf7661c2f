-- Remove an entity with all that is derived from it, or what belongs to one group of a topic; once, however often and late
-- it is sent: what was made anew meanwhile stays.
-- flags: allow-oom
-- uses: common
-- KEYS: 1 the entity, 2 the answer to this very call
-- ARGV: 1 kind, 2 group or ''
if redis.call('EXISTS', KEYS[2]) == 1 then return 'OK' end
local E, group = KEYS[1], ARGV[2]
local base = string.match(E, '^bk:{[^}]*}')
local gone = {}

local function remove(key)
  gone[#gone + 1] = key
  if #gone == 500 then
    redis.call('UNLINK', unpack(gone))
    gone = {}
  end
end

local function remove_queue(Q)
  for p = 0, 255 do
    if p >= tonumber(redis.call('HGET', Q, 'priorities') or 1) then break end
    remove(Q .. ':r' .. p)
  end
  for _, session in ipairs(redis.call('ZRANGE', Q .. ':n', 0, -1)) do remove(Q .. ':h:' .. session) end
  local idle = redis.call('ZRANGE', Q .. ':w', 0, -1)
  for _, part in ipairs({':x', ':d', ':n', ':w', ':y', ':u'}) do remove(Q .. part) end
  for _, name in ipairs(idle) do  -- they find out when they look
    local process, session = string.match(name, '^(.-)/(.*)$')
    if process then redis.call('SPUBLISH', Q .. ':c:' .. process, session) end
  end
end

local function remove_group(T, name)
  remove(T .. ':g:' .. name)
  remove(T .. ':m:' .. name)
  redis.call('SREM', T .. ':gs', name)
  redis.call('SPUBLISH', T .. ':c', 'g ' .. name)
end

local function remove_topic(T)
  for _, name in ipairs(redis.call('SMEMBERS', T .. ':gs')) do remove_group(T, name) end
  for p = 0, tonumber(redis.call('HGET', T, 'partitions') or 1) - 1 do
    remove(T .. ':' .. p)
    redis.pcall('SPUBLISH', T .. ':c:' .. p, '')
  end
  remove(T .. ':gs')
end

local function remove_entity(key)
  local kind = redis.call('HGET', key, 'kind')
  if kind == 'q' then remove_queue(key)
  elseif kind == 't' then remove_topic(key)
  elseif kind == 'd' then remove(key .. ':l') end
  remove(key)
  redis.call('SREM', base .. ':e', key)
end

local kind = redis.call('HGET', E, 'kind')
if kind and kind ~= ARGV[1] then return redis.error_reply('BK MISMATCH that name is another kind of address') end
-- What brokerkit itself derives from a queue and from a group has known names; the rest is listed.
local derived = redis.call('SMEMBERS', base .. ':e')
local beginning, groups = E .. '..', {group}
if group == '' then
  groups = redis.call('SMEMBERS', E .. ':gs')
  derived[#derived + 1] = beginning .. 'dead'
  remove_entity(E)
else
  beginning = beginning .. group .. '..'
  remove_group(E, group)
end
for _, name in ipairs(groups) do
  derived[#derived + 1] = E .. '..' .. name .. '..dead'
  derived[#derived + 1] = E .. '..' .. name .. '..again'
end
for _, key in ipairs(derived) do
  if string.sub(key, 1, #beginning) == beginning then remove_entity(key) end
end
if #gone > 0 then redis.call('UNLINK', unpack(gone)) end
redis.call('SET', KEYS[2], '1', 'PX', 3600000)
return 'OK'
