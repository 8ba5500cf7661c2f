-- Give a session that has missed replies a new name, so that what it sent before and comes late does nothing any more; and hand
-- back what it does not know that it holds.
-- flags: allow-oom
-- uses: common queue_base
-- ARGV: 1 new name, 2 how many names it may have had, those, then the numbers (6 bytes each) that it knows
-- Returns the ms that it owns what it holds, then those of the numbers that are not there.
return run(function()
  local name, names, alive = ARGV[1], tonumber(ARGV[2]), false
  for i = 3, 2 + names do
    local old = ARGV[i]
    if deadline_of(old) then
      alive = true
      if old ~= name then
        if redis.call('EXISTS', E .. ':h:' .. old) == 1 then
          redis.call('RENAME', E .. ':h:' .. old, E .. ':h:' .. name)
        end
        redis.call('ZREM', E .. ':n', old)
        redis.call('ZREM', E .. ':w', old)
        redis.call('SREM', E .. ':y', old)
      end
    end
  end
  if not alive then return redis.error_reply('BK LOST') end
  local owned = renew(name)
  local held, known, unknown = E .. ':h:' .. name, {}, {}
  for i = 3 + names, #ARGV do known[ARGV[i]] = 'missing' end
  for _, number in ipairs(redis.call('HKEYS', held)) do
    if known[number] then known[number] = 'there' else unknown[#unknown + 1] = number end
  end
  local elements = {}
  for _, number in ipairs(unknown) do
    elements[#elements + 1] = redis.call('HGET', held, number)
  end
  hand_back(elements)
  in_chunks('HDEL', held, unknown)
  wake(E, math.max(1, #elements))
  local reply = {owned}
  for number, state in pairs(known) do
    if state == 'missing' then reply[#reply + 1] = number end
  end
  return reply
end)
