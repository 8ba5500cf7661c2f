-- Store positions of partitions that somebody owns, and what its settlements publish: all of it, or nothing.
-- flags: allow-oom
-- uses: common store topic_base
-- KEYS: 1 topic, then where copies are stored
-- ARGV: 1 group, 2 member, 3 number of this call among those that store positions, 4 partitions,
--       then for each partition: p, epoch, position
--       then for each settlement: place of its partition (from 0), number of copies, and for each copy:
--       place of its key (from 0), kind, settings to create it with or '', blob
-- Returns 'done' and the places of partitions that belong to others by now, whose settlements have no effect; or 'no' and
-- place of a settlement, place of its copy, what is wrong, ...: then nothing at all has happened.  What was done before is not done again.
local E, group, me, number = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local G = E .. ':g:' .. group
local claims = tonumber(ARGV[4])

local names = {'s:' .. me}
for i = 0, claims - 1 do names[2 + i] = 'own' .. ARGV[5 + 3 * i] end
local rights = fetch(G, names)
local before = rights[1] and tonumber(string.match(rights[1], '^%d+')) or 0
if number <= before then
  local places = {'done'}
  if number == before then
    for place in string.gmatch(string.match(rights[1], '^%d+(.*)$'), '%d+') do places[#places + 1] = tonumber(place) end
  end
  return places
end
local lost, places = {}, {'done'}
for i = 0, claims - 1 do
  if rights[2 + i] ~= me .. ':' .. ARGV[6 + 3 * i] then
    lost[i] = true
    places[#places + 1] = i
  end
end

local pushes, wrong = {}, {'no'}
local at, settlement = 5 + 3 * claims, 0
while at <= #ARGV do
  local dropped = lost[tonumber(ARGV[at])]
  local copies = tonumber(ARGV[at + 1])
  local refused = false
  at = at + 2
  for copy = 0, copies - 1 do
    if not dropped and not refused then
      local entity, problem = open(KEYS[2 + tonumber(ARGV[at])], ARGV[at + 1], ARGV[at + 2])
      if entity then
        pushes[#pushes + 1] = {entity, ARGV[at + 3]}
      else
        refused = true
        wrong[#wrong + 1] = settlement
        wrong[#wrong + 1] = copy
        wrong[#wrong + 1] = problem
      end
    end
    at = at + 4
  end
  settlement = settlement + 1
end
if #wrong > 1 then return wrong end

for _, each in ipairs(pushes) do push(each[1], each[2]) end
finish()
local values = {}
for i = 0, claims - 1 do
  if not lost[i] then
    values[#values + 1] = 'c' .. ARGV[5 + 3 * i]
    values[#values + 1] = ARGV[7 + 3 * i]
  end
end
if #values > 0 then
  values[#values + 1] = 's:' .. me
  values[#values + 1] = ARGV[3] .. ' ' .. table.concat(places, ' ', 2)
  keep(G, values)
end
return places
