-- Hand back what a session holds, uncounted.
-- flags: allow-oom
-- uses: common queue_base
-- ARGV: 1 session, then numbers (6 bytes each); what it does not hold is passed over
return run(function()
  local held = E .. ':h:' .. ARGV[1]
  local numbers, elements, seen = {}, {}, {}
  for first = 2, #ARGV, CHUNK do
    local last = math.min(first + CHUNK - 1, #ARGV)
    for i, element in ipairs(redis.call('HMGET', held, unpack(ARGV, first, last))) do
      local number = ARGV[first + i - 1]
      if element and not seen[number] then
        seen[number] = true
        numbers[#numbers + 1] = number
        elements[#elements + 1] = element
      end
    end
  end
  hand_back(elements)
  in_chunks('HDEL', held, numbers)
  wake(E, #elements)
  return #elements
end)
